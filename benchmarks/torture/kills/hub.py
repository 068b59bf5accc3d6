"""The loopback Hub in a process of its own, which nobody kills, and questions to it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

TOKEN = "hf_adaadaada"


def serve(folder: Path, inputs: Path, questions: Any) -> None:
    """Run the Hub with base and adapter on it; answer until None comes."""
    from loopback import LoopbackHub, environment  # type: ignore[import-not-found]

    from torture.kills.scene import ADAPTER, BASE

    with LoopbackHub(folder / "storage", {TOKEN: "ada"}) as hub:
        hub.add_folder(BASE, inputs / "base")
        hub.add_folder(ADAPTER, inputs / "hub" / "adapter")
        questions.send(environment(hub, folder / "home", TOKEN))
        while (repo := questions.recv()) is not None:
            held = hub.files(repo) if repo in hub.repos() else {}
            # The card names its own repository.
            questions.send({name: digest for name, (_, digest) in held.items() if name != "README.md"})


class Hub:
    """The running Hub, as other processes have it: `environment` is for its clients."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._questions, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(folder, inputs, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.environment: dict[str, str] = self._questions.recv()
        os.environ |= self.environment

    def files(self, repo: str) -> dict[str, str]:
        """Digests by name, without the card."""
        self._questions.send(repo)
        found: dict[str, str] = self._questions.recv()
        return found

    def close(self) -> None:
        self._questions.send(None)
        self._process.join()
