"""A Ray cluster of two nodes on this machine, workers that wait when they are told, and commands beside it."""

from __future__ import annotations

import os

# Read when Ray is imported: what listens here listens on the loopback device alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from conftest import make_adapter, make_base
from ray.cluster_utils import Cluster

import fossil_export
from fossil_export import merge

PACKAGE = Path(fossil_export.__file__).parent
NODE = {"object_store_memory": 80 << 20, "num_cpus": 2}
PATIENCE = 120.0

HOLD = """
import time as _time
_write = OutputFile.write
def _held(self, offset, data):
    _write(self, offset, data)
    here = Path(os.environ["FOSSIL_TEST_HOLD"])
    after = (here / "after").read_text() if (here / "after").exists() else None
    if after is None or len(list(self.notes.glob("*.json"))) < int(after):
        return
    (here / f"held-{os.getpid()}-{os.getppid()}").touch()
    while (here / "after").exists():
        _time.sleep(0.02)
OutputFile.write = _held
_init = OutputFile.__init__
def _noted(self, path, *arguments, **options):
    self.notes = path.parent / "notes"
    _init(self, path, *arguments, **options)
OutputFile.__init__ = _noted
"""
# At the end of the workers' writing/_output.py: who has written a part of a file waits, once so many files are made.

FULL = """
import os as _os
from pathlib import Path as _Path
def _short(home, names):
    import ray
    full = _Path(_os.environ["FOSSIL_TEST_HOLD"], "full")
    nodes = full.read_text().split() if full.exists() else []
    return (5000, 1000, "/disk") if ray.get_runtime_context().get_node_id() in nodes else None
"""
# At the end of their clusters/_worker.py: nodes without room.


@dataclass
class Scene:
    """A cluster of two nodes; `held` is the folder by which its workers are held, `local` the local merge."""

    cluster: Cluster
    held: Path
    base: Path
    adapter: Path
    local: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def hold(self, after: int = 0) -> None:
        for path in self.held.iterdir():
            path.unlink()
        (self.held / "after").write_text(str(after))

    def go(self) -> None:
        (self.held / "after").unlink(missing_ok=True)

    def at_work(self, parent: int | None = None) -> int:
        """The process of a worker in the middle of a file, on the node with this raylet."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for path in self.held.glob("held-*"):
                _, process, node = path.name.split("-")
                if parent in (None, int(node)):
                    return int(process)
            time.sleep(0.02)
        raise AssertionError("no worker came to write")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("ray")
    base = make_base(folder / "base")
    make_adapter(folder / "adapter", base)
    shutil.copytree(PACKAGE, folder / "code" / "fossil_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name, more in (("writing/_output.py", HOLD), ("clusters/_worker.py", FULL)):
        with (folder / "code" / "fossil_export" / name).open("a") as file:
            file.write(more)
    held = folder / "held"
    held.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "code"))
        patch.setenv("FOSSIL_TEST_HOLD", str(held))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster()
        try:
            cluster.add_node(node_ip_address="127.0.0.1", include_dashboard=False, **NODE)
            cluster.add_node(node_ip_address="127.0.0.2", **NODE)
            merge(folder / "adapter", folder / "local", base=base)
            yield Scene(cluster, held, base, folder / "adapter", folder / "local")
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def joined(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """This process is connected to the cluster by itself."""
    if not ray.is_initialized():
        monkeypatch.chdir(scene.held)  # Ray's workers would take this package from the current folder
        ray.init(scene.address, log_to_driver=False, logging_level="CRITICAL")
    scene.go()
    yield scene
    scene.go()
    (scene.held / "full").unlink(missing_ok=True)


def command(scene: Scene, output: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["merge", str(scene.adapter), "--base", str(scene.base), "--output", str(output), "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "fossil_export", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup and & ignore it
    )


def is_over(process: int) -> bool:
    """Whether a process ends in time."""
    end = time.monotonic() + PATIENCE
    while (there := Path(f"/proc/{process}").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    return not there


def meanwhile(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what)
    thread.start()
    return thread
