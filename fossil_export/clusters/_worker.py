"""What runs on the workers: a process makes the plan itself, once, and then the files that it is given."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fossil_export.checkpoints._folder import Folder
from fossil_export.clusters._asked import Asked
from fossil_export.clusters._board import Reporter
from fossil_export.errors import FossilExportError, OutputError, reason, remedy
from fossil_export.merging import _memory
from fossil_export.merging._assembling import write_files
from fossil_export.merging._digest import PlanDigest, plan_digest
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import settled
from fossil_export.storage import fetch
from fossil_export.writing._place import find_place

WAITING = 2
"""Threads of a task that wait for a disk, beside those that its CPUs carry."""

SPARE = 256 << 20
"""Bytes that stay free on a disk that a base is fetched to."""


@dataclass(frozen=True)
class Order:
    """What is the same for all files of a merge: `digest` is that of the plan, `cpus` what each task has."""

    asked: Asked
    output: str
    digest: str
    device: str
    hash: bool
    cpus: float


_plans: dict[str, tuple[MergePlan, PlanDigest]] = {}
"""The plan of this process and its digest, by what it is of."""


def task() -> Callable[..., dict[str, Any]]:
    """The function that a worker runs. It is sent as it stands here, so that a worker with another version of this
    package, or none, can say so: it may use nothing of this module, and only import what it needs."""

    def merge_file(
        version: str, order: bytes, name: str, attempt: int, board: Any, folder: str | None
    ) -> dict[str, Any]:
        import os
        import pickle
        import sys

        import ray

        if folder is not None:  # Ray puts the driver's current folder first, which holds data and no code
            asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            sys.path[:] = [one for one in sys.path if one and (one != folder or one in asked)]
        node = ray.get_runtime_context().get_node_id()
        board.report.remote(name, attempt, node, 0)
        try:
            from fossil_export.version import __version__ as found
        except ImportError:
            found = ""
        if found != version:
            return {"node": node, "version": found}
        from fossil_export.clusters._worker import make

        return {"node": node, **make(pickle.loads(order), name, attempt, board, node)}

    return merge_file


def make(order: Order, name: str, attempt: int, board: Any, node: str) -> dict[str, Any]:
    """Merge the file `name` into the result that comes together at the output, and note it there.

    Returns what a merge has of a file (`FileResult.to_dict`) as "result"; else "other" (what the plan was made of
    here, if that is not what it was made of where the merge was asked for), "no_room" (bytes needed, bytes free, and
    the disk), or "refused" (the class of an error) with its "line": errors go by name, so that Ray has no traceback.
    """
    try:
        plan, found = _planned(order)
        if found.digest != order.digest:
            return {"other": dict(found.about)}
        place = find_place(order.output)
        if not place.is_begun():
            raise OutputError(
                f"{order.output}: what the merge began there is not to be seen; name a folder that all nodes share, "
                "or a place in an object store"
            )
        file = next(one for one in plan.files if one.name == name)
        if (short := _fetched(plan, file)) is not None:
            return {"no_room": short}
        with place.assemble(found.digest, found.about, shared=True) as assembly:
            report = Reporter(board, name, attempt, node)
            try:
                made = write_files(plan, [file], assembly, device=order.device, hash=order.hash, progress=report)
            except OSError as problem:
                plan.check()  # an input that is gone is no fault of the output's
                raise assembly.failed(problem) from problem
    except FossilExportError as problem:
        return {"refused": type(problem).__name__, "line": str(problem)}
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        return {"refused": "ClusterError", "line": f"{where}{reason(problem)}; {remedy(problem)}"}
    return {"result": made[name].to_dict()}


def _planned(order: Order) -> tuple[MergePlan, PlanDigest]:
    """The plan, made once in this process, and its digest."""
    key = f"{order.digest} {order.device} {order.asked}"
    if key not in _plans:
        _plans.clear()
        _memory.THREADS = min(_memory.THREADS, math.ceil(order.cpus) + WAITING)
        plan = order.asked.plan()
        fetch(*plan.needed_for(()))
        plan = settled(plan)
        _plans[key] = plan, plan_digest(plan, order.device)
    plan, found = _plans[key]
    plan.check()
    return plan, found


def _fetched(plan: MergePlan, file: FilePlan) -> tuple[int, int, str] | None:
    """Fetch the files of the base that `file` is made of; without room for them, the bytes that are needed, those that
    are free, and the disk."""
    needed = plan.needed_for([file])
    home, names = needed[-1].folder, needed[-1].names
    if (short := _short(home, names)) is not None:
        return short
    try:
        fetch(*needed)
    except FossilExportError:
        if (short := _short(home, names)) is not None:  # another task took it
            return short
        raise
    return None


def _short(home: Folder, names: tuple[str, ...]) -> tuple[int, int, str] | None:
    missing = [] if home.is_here else [name for name in names if not (home.path / name).is_file()]
    if not missing:
        return None
    disk = home.path
    while not disk.exists():
        disk = disk.parent
    needed, free = sum(map(home.size, missing)) + SPARE, shutil.disk_usage(disk).free
    return (needed, free, str(disk)) if free < needed else None
