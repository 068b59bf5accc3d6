"""One task a file, until all are made: which are running, what came of them, and what is given to another worker."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fossil_export import errors
from fossil_export._extras import required
from fossil_export._progress import note
from fossil_export.clusters._board import Reached, board_class
from fossil_export.clusters._connection import Connection, failed
from fossil_export.clusters._worker import Order, task
from fossil_export.errors import ClusterError, FossilExportError
from fossil_export.merging._digest import PlanDigest
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._run import FileResult
from fossil_export.version import __version__

TRIES = 4
"""How often a file is begun whose worker dies; a node that went away is not the file's fault and does not count."""

POLL = 0.1
"""Seconds between two looks at the tasks. Short, and outside of Ray, so that Ctrl-C is obeyed at once."""

WITHOUT = 300.0
"""Seconds that a cluster may have no node to work on, before it is given up: an autoscaler starts some meanwhile."""


@dataclass
class _File:
    """A file that is to be made: how often it was begun, and how often a worker died over it."""

    name: str
    size: int
    attempt: int = 0
    deaths: int = 0
    full: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # by node: bytes needed, free, and the disk


class Tasks:
    """Use it in a `with`: when the block ends, no task runs any more."""

    def __init__(
        self,
        connection: Connection,
        order: Order,
        digest: PlanDigest,
        progress: Callable[[int], None],
        forget: str | None,
    ) -> None:
        self._connection = connection
        self._ray = ray = connection.ray
        self._order, self._digest, self._forget = order, digest, forget
        self.progress = Reached(progress)
        self._running: dict[Any, _File] = {}
        self._strategies = required("ray.util.scheduling_strategies", "ray")
        self._without = time.monotonic() + WITHOUT
        self._looked = 0.0
        self._answer: Any = None
        self.again = 0
        gpus = {"num_gpus": 1} if order.device != "cpu" else {}
        self._function = ray.remote(max_retries=0, num_cpus=order.cpus, **gpus)(task())
        # Beside this process: a node that goes away does not take it along.
        here = self._strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1)(board_class())
        self._board = board.options(scheduling_strategy=here).remote()
        self._data = pickle.dumps(order)

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *problem: object) -> None:
        """Workers that still write are ended, not interrupted: Ray would give such a process, with what it was just
        importing left half done, to the next task. What they wrote is removed by whoever takes the result up."""
        ray, left = self._ray, list(self._running)
        for one in left:
            with suppress(Exception):
                ray.cancel(one, force=True)
        with suppress(Exception):
            left += [self._answer] if self._answer is not None else []
            ray.wait(left, num_returns=len(left), timeout=3)
        # The board goes when nobody holds it. To kill it while it answers would make Ray end this process (2.60).
        self._running.clear()
        self._board = self._answer = None

    def run(self, files: list[FilePlan]) -> Iterator[FileResult]:
        """`files`, made, as they get done: the largest are begun first. Raises what a worker
        refused, and ClusterError for a file that no worker can make."""
        for file in sorted(files, key=lambda one: one.size, reverse=True):
            self._begin(_File(file.name, sum(tensor.nbytes for tensor, _ in file.tensors)))
        while self._running:
            try:
                done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            except Exception as problem:
                raise failed(self._connection.address, problem) from problem
            for one in done:
                if (found := self._ended(one, self._running.pop(one))) is not None:
                    yield found
            if not done:
                self._look()
                time.sleep(POLL)

    def _begin(self, file: _File) -> None:
        file.attempt += 1
        arguments = (__version__, self._data, file.name, file.attempt, self._board, self._forget)
        call = self._function.options(scheduling_strategy=self._strategy(file), name=file.name)
        self._running[call.remote(*arguments)] = file

    def _strategy(self, file: _File) -> Any:
        """Spread over all nodes; after one had no room, another one that may have."""
        if not file.full:
            return "SPREAD"
        cpus = self._order.cpus
        nodes = {
            node: about for node, about in self._connection.nodes().items() if about["Resources"].get("CPU", 0) >= cpus
        }
        left = [node for node in nodes if node not in file.full]
        if not left:
            needed = max(needed for needed, _, _ in file.full.values())
            node, (_, free, where) = max(file.full.items(), key=lambda one: one[1][1])
            raise ClusterError(
                f"{file.name}: no worker has room for the {needed:,} bytes of the base that it is made of; the most is "
                f"{free:,} free in {where} on {self._connection.node_name(node)}; make room there, or keep the base "
                "in a folder that all nodes see"
            )
        # What is sent there waits its turn; those with the fewest files that had to go elsewhere come first.
        waiting = [one for one in self._running.values() if one.full]
        node = min(left, key=lambda one: (sum(one not in other.full for other in waiting), one))
        return self._strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _ended(self, one: Any, file: _File) -> FileResult | None:
        try:
            found: dict[str, Any] = self._ray.get(one)
        except self._ray.exceptions.RayTaskError as problem:  # what nobody expected; --debug shows it
            cause = " ".join(str(problem.cause).split())
            raise ClusterError(
                f"{file.name}: its worker failed: {type(problem.cause).__name__}: {cause}; look at its log (ray logs)"
            ) from problem
        except self._ray.exceptions.RayError as problem:
            self._died(file, problem)
            return None
        node = self._connection.node_name(found["node"])
        if "version" in found:
            raise _other_version(node, found["version"])
        if "other" in found:
            raise self._other_files(node, found["other"])
        if "refused" in found:
            kind = getattr(errors, found["refused"], ClusterError)
            refused: FossilExportError = kind.__new__(kind, f"{found['line']} (on the node {node})")
            raise refused
        if "no_room" in found:
            file.full[found["node"]] = tuple(found["no_room"])
            note(f"{file.name}: {node} has no room for it; made elsewhere")
            self._begin(file)
            return None
        self.progress.reached(file.name, file.size)
        return FileResult.from_dict(found["result"])

    def _other_files(self, node: str, about: dict[str, str]) -> ClusterError:
        wrong = [name for name, what in self._digest.about.items() if about.get(name) != what and name != "plan"]
        what = ", ".join(f"{name} {about.get(name)}, here {self._digest.about[name]}" for name in wrong) or "plan"
        return ClusterError(
            f"node {node}: makes another merge of this ({what}); see that all nodes have the same files under these "
            "names, at the same times, and the same fossil-export, transformers and Python"
        )

    def _died(self, file: _File, problem: Exception) -> None:
        """A worker was killed, or its node is gone: the file is made again."""
        self._take(wait=1.0)
        node = self.progress.nodes.get((file.name, file.attempt))
        name = self._connection.node_name(node)
        is_gone = node is not None and node not in self._connection.nodes()
        file.deaths += not is_gone and type(problem).__name__ != "TaskUnschedulableError"
        if file.deaths >= TRIES:
            why = _WHY.get(type(problem).__name__, "it was killed")
            raise ClusterError(
                f"{file.name}: its worker ended {file.deaths} times before it was made, last on the node {name}: "
                f"{why}; see that a task has memory there, then run the same command again"
            ) from problem
        self.again += 1
        note(f"{file.name}: {f'the node {name} is gone' if is_gone else f'its worker on {name} ended'}; made again")
        self._begin(file)

    def _look(self) -> None:
        self._take()
        now = time.monotonic()
        if now - self._looked < 5:
            return
        self._looked = now
        if any(node["Resources"].get("CPU") for node in self._connection.nodes().values()):
            self._without = now + WITHOUT
        elif now > self._without:
            raise ClusterError(
                f"{self._connection.address}: the cluster has had no worker for {WITHOUT:.0f} seconds; add nodes, then "
                "run the same command again, which goes on from here"
            )

    def _take(self, wait: float = 0) -> None:
        """What the workers reported, without waiting for it: the answer is looked at the next time."""
        ray = self._ray
        if self._answer is None:
            self._answer = self._board.take.remote()
        try:
            if ray.wait([self._answer], timeout=wait)[0]:
                answer, self._answer = self._answer, None
                self.progress.seen(ray.get(answer))
        except ray.exceptions.RayError:  # it starts anew if its node died; the next reports tell as much
            self._answer = None


_WHY = {
    "OutOfMemoryError": "it was out of memory",
    "NodeDiedError": "the node is gone",
    "TaskCancelledError": "it was cancelled",
    "TaskUnschedulableError": "the node is gone",
}


def _other_version(node: str, found: str) -> ClusterError:
    has = f"has fossil-export {found}, and this machine {__version__}" if found else "has no fossil-export"
    return ClusterError(f"node {node}: {has}; install the same there: pip install 'fossil-export[ray]=={__version__}'")
