"""Cases that publish, on the Hub of the tests, which serves 127.0.0.1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from same.cases import OUT, QV, Case, Command, Maker

TOKEN, USER = "hf_samebytes", "ada"


@dataclass(frozen=True)
class Hub:
    """A Hub that runs: the environment for its clients, and its own object."""

    environment: dict[str, str]
    served: Any

    def published(self) -> dict[str, bytes]:
        """All files of all branches of all repositories, and the titles of the commits."""
        found = {}
        for repo in self.served.repos():
            for branch in sorted(self.served.readable(repo.split("/")[0], repo).branches):
                place = f"{repo}@{branch.replace('/', '_')}"
                found[f"{place}/commits"] = "\n".join(self.served.commits(repo, branch)).encode()
                for path in self.served.files(repo, branch):
                    found[f"{place}/files/{path}"] = self.served.read(repo, path, branch)
        return found

    def plain(self, content: bytes) -> bytes:
        """Without the port, which another run does not get."""
        return content.replace(f":{self.served.port}".encode(), b":PORT")


@contextmanager
def running(work: Path, inputs: Path) -> Iterator[Hub]:
    """A fresh Hub with the repositories of the inputs; the home of its clients and its storage are in `work`."""
    loopback_hub, environment = _tests()
    with loopback_hub(work / "storage", {TOKEN: USER}) as served:
        served.create("bob/gated", gated=True)
        served.create("bob/model")
        for folder in sorted(_seeds(inputs).iterdir()):
            served.add_folder(f"{USER}/{folder.name}", folder)
            served.add_folder("bob/gated", folder)
        yield Hub(environment(served, work / "home", TOKEN), served)


def _tests() -> tuple[Any, Any]:
    """The Hub of the tests, and what makes the environment of its clients."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from loopback import LoopbackHub, environment  # type: ignore[import-not-found]

    return LoopbackHub, environment


class _Seeds(Maker):
    """A maker whose folders are repositories."""

    def named(self, name: str) -> _Seeds:
        self._name = name
        return self

    def folder(self) -> Path:
        return _seeds(self.root) / self._name


def _seeds(inputs: Path) -> Path:
    """Each folder in there is a repository."""
    return inputs / "repositories"


def pushes(maker: Maker, count: int) -> Iterator[Case]:
    seeds = _Seeds(maker.kind, maker.root, 0)
    seeds.rng = maker.rng
    many = seeds.named("many").base(files=4)
    one = seeds.named("one").base(files=1, dtype="bfloat16")
    tied = seeds.named("tied").base(tie=True)
    adapters = {
        "qv": seeds.named("qv").adapter(many, targets=QV, base_model_name_or_path="ada/many"),
        "linear": maker.adapter(many),
        "mini": maker.adapter(many, variant="mini", mini=4),
        "bat": maker.adapter(many, variant="bat"),
        "saved": maker.adapter(many, targets=QV, saved=["lm_head"]),
        "half": maker.adapter(one, targets=QV),
        "head": maker.adapter(tied, targets=QV, saved=["lm_head"]),
        "rest": maker.adapter(tied, targets=QV, saved=["norm"]),
    }
    path = {name: str(adapter.path) for name, adapter in adapters.items()}
    repo = "ada/{name}"
    merge = ("merge", "ada/qv", "-o", OUT, "--hash", "--json")
    json_push = ("push", OUT, repo, "--json")
    to_lora = ("convert", "ada/qv", "--to", "lora", "-o", OUT)
    verify = ("verify", "--level", "weights")

    yield maker.case("merge and push, and again", merge, json_push, ("push", OUT, repo))
    yield maker.case("verify, push", merge, (*verify, OUT), json_push, (*verify, repo, "--push-to-hub", "--json"))
    yield maker.case("to a branch", merge, (*json_push, "--revision", "dev"), ("push", OUT, repo, "--revision", "dev"))
    yield maker.case("pull request", merge, json_push, merge_over(merge), (*json_push, "--create-pr"))
    yield maker.case("private", merge, (*json_push, "--private", "--commit-message", "Mine"))
    yield maker.case("LoRA", to_lora, json_push)
    yield maker.case("MISS", ("convert", path["linear"], "--to", "miss", "-o", OUT), json_push)
    gguf = ("convert", path["linear"], "--to", "gguf-lora", "-o", "{case}/out.gguf")
    yield maker.case("GGUF", gguf, ("push", "{case}/out.gguf", repo, "--json"))
    yield maker.case("adapter", ("push", path["qv"], repo, "--json"))
    yield maker.case("merge --push-to-hub", (*merge, "--push-to-hub", repo), ("inspect", "ada/qv", "--json"))
    yield maker.case("merge --push-to-hub, text", (*merge[:-1], "--push-to-hub", repo))
    for name, command in {
        "somebody else's": ("push", OUT, "bob/model"),
        "not there": ("merge", "ada/none", "-o", "{case}/none"),
        "gated": ("merge", "ada/qv", "--base", "bob/gated", "-o", "{case}/none"),
        "odd name": ("push", OUT, "ada/a b"),
    }.items():
        yield maker.case(f"refused: {name}", merge, command)

    def stream(adapter: str, base: str, *options: str) -> Command:
        cache = ("--cache-dir", "{case}/cache")
        return ("merge", adapter, "--base", base, "--push-to-hub", repo, "--stream", *cache, *options)

    streams = {
        "qv": stream("ada/qv", "ada/many"),
        "linear": stream(path["linear"], "ada/many", "--hash"),
        "mini": stream(path["mini"], "ada/many"),
        "bat": stream(path["bat"], "ada/many"),
        "one file": stream(path["half"], "ada/one"),
        "by file": stream(path["half"], "hf://ada/one/model.safetensors"),
        "saved": stream(path["saved"], "ada/many", "--hash"),
        "tied": stream(path["rest"], "ada/tied"),
        "trained head": stream(path["head"], "ada/tied"),
        "bfloat16": stream("ada/qv", "ada/many", "--dtype", "bfloat16"),
        "cut": stream("ada/qv", "ada/many", "--max-shard-size", "50KB"),
        "into one": stream("ada/qv", "ada/many", "--max-shard-size", "1GB"),
        "local": stream(path["linear"], str(many.path)),
        "branch": stream("ada/qv", "ada/many", "--revision", "tuned"),
        "little disk": stream("ada/qv", "ada/many", "--max-disk", "1KB"),
    }
    for name, command in streams.items():
        dry = (*command, "--dry-run")
        yield maker.case(f"stream: {name}", dry, (*dry, "--json"), (*command, "--json"), command)


def merge_over(merge: Command) -> Command:
    """The same merge, in another dtype, over its own output."""
    return (*merge, "--overwrite", "--dtype", "bfloat16")
