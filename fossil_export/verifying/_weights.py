"""Weights level: every stored tensor against the base and a float64 reconstruction, streamed.

Untouched tensors must be the base's bytes. A merged one must be the exact W' rounded once: no element may
be further from it than half a step of its dtype, plus the float32 arithmetic's own error (`TOLERANCE` for
a sum, a proven bound for bat's products).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

from fossil_export._cores import cores
from fossil_export._threads import in_order, one_blas_thread
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, FLOATS, element_count
from fossil_export.checkpoints._source import by_path
from fossil_export.merging._change import Change, parts_of
from fossil_export.merging._place import place
from fossil_export.merging._placement import Places, together
from fossil_export.merging._planning import stored_dtype
from fossil_export.merging._replication import replicated
from fossil_export.merging._ties import are_equal
from fossil_export.verifying._comparison import compare
from fossil_export.verifying._compiled import loops
from fossil_export.verifying._files import FEW, Files
from fossil_export.verifying._job import SLAB, Job, Piece, Sums
from fossil_export.verifying._sum import Sum

AHEAD = 4
"""Tasks that wait for each thread: enough that none is idle, few enough that they take no memory in any model."""

SMALL = 64 << 10
"""Bytes that a piece counts for beside its own, in a batch of small ones."""


@dataclass(frozen=True)
class TensorCheck:
    """The comparison of one tensor.

    `worst` error is in steps of its dtype, for bat less the bound of float32's own; `off` elements, of
    `elements`, are not the exact result rounded once. `survived` is the share of the update that was stored,
    on one row in `SAMPLED` (None for an unmerged tensor); `problem` is None for a tensor as it should be.
    """

    name: str
    action: str
    module: str | None = None
    elements: int = 0
    worst: float = 0.0
    off: int = 0
    kept: float = 0.0
    update: float = 0.0
    problem: str | None = None

    @property
    def survived(self) -> float | None:
        return self.kept / self.update if self.update else None


def check_weights(
    artifact: Checkpoint,
    base: Checkpoint,
    added: Sum,
    dtype: str = "auto",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[TensorCheck, ...]:
    """Compare every tensor of `artifact` with what the adapters `added` to `base` must give, in the base's order.

    `dtype` is what the merge was asked for ("auto": each tensor keeps its own). Reads every byte once, in
    little memory. Raises MergeError where an adapter does not belong to the base.
    """
    base = replicated(added.adapters, base)
    return check_tensors(artifact, base, added, places_of(added, base), dtype, progress, {})


def check_tensors(
    artifact: Checkpoint,
    base: Checkpoint,
    added: Sum,
    places: Places,
    dtype: str,
    progress: Callable[[int], None],
    known: Mapping[str, TensorCheck],
) -> tuple[TensorCheck, ...]:
    """The same for what goes to these `places`; of some tensors the check is `known`."""
    adapters = ((one.home, one.headers) for one in added.adapters)
    headers = by_path((artifact.home, artifact.files), (base.home, base.files), *adapters)
    threads = cores() if loops() is not None else min(cores(), FEW)
    checks: list[TensorCheck] = []
    with one_blas_thread(), Files(headers) as files, ThreadPoolExecutor(threads) as pool:
        found = (
            known.get(name) or _expected(name, artifact, base, places, dtype)
            for name in chain(base.tensors, places.added)
        )
        calls = (partial(_compare_all, batch, added, files, progress) for batch in _batches(found))
        with closing(in_order(pool, calls, AHEAD * threads)) as results:
            parts: list[tuple[Job, Sums]] = []
            for one in chain.from_iterable(results):
                if isinstance(one, TensorCheck):
                    checks.append(one)
                    continue
                job, sums, is_last = one
                if parts and parts[-1][0] is job:
                    sums = parts.pop()[1] + sums
                parts.append((job, sums))
                if is_last:
                    checks.append(_summary(parts))
                    parts = []
        files.check()
    checks += [
        TensorCheck(name, "extra", problem="is in the artifact, but neither in the base nor in the adapter")
        for name in artifact.tensors
        if name not in base.tensors and name not in places.added
    ]
    return tuple(checks)


Batch = list["tuple[Piece, bool] | TensorCheck"]
"""Pieces, with whether they are their tensor's last, and checks that are known, in the order of the tensors."""


def _batches(tensors: Iterable[tuple[Job, ...] | TensorCheck]) -> Iterator[Batch]:
    """All that is to be compared; what is small is put together, as handing it to a thread takes as long."""
    batch: Batch = []
    size = 0
    for found in tensors:
        if isinstance(found, TensorCheck):
            batch.append(found)
            size += SMALL
        else:
            pieces = chain.from_iterable(job.pieces() for job in found)
            before = next(pieces, None)
            if before is None:
                batch.append(_summary([(job, Sums()) for job in found]))
            while before is not None:
                after = next(pieces, None)
                batch.append((before, after is None))
                size += before.nbytes + SMALL
                if size >= SLAB:
                    yield batch
                    batch, size = [], 0
                before = after
        if size >= SLAB:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _compare_all(
    batch: Batch, added: Sum, files: Files, progress: Callable[[int], None]
) -> list[tuple[Job, Sums, bool] | TensorCheck]:
    return [
        one if isinstance(one, TensorCheck) else (one[0].job, compare(one[0], added, files, progress), one[1])
        for one in batch
    ]


def places_of(added: Sum, base: Checkpoint) -> Places:
    """Where everything that was trained goes. Raises MergeError where it has no place."""
    placements = []
    for adapter in added.adapters:
        placement = place(adapter, base)
        if placement.undecided is not None:
            placement = place(adapter, base, are_equal(adapter, base, placement))
        placements.append(placement)
    return together(added.adapters, placements, added.weights)


def _expected(
    name: str, artifact: Checkpoint, base: Checkpoint, places: Places, dtype: str
) -> tuple[Job, ...] | TensorCheck:
    """What to compare tensor `name` with, or the check that already failed."""
    own = base.tensors.get(name)
    source, owner = places.sources.get(name, (own, None))
    assert source is not None, name
    changes, pieces = places.changes.get(name, ()), places.pieces.get(name, ())
    action = "merge" if changes else "replace" if owner is not None or pieces else "copy"
    found = artifact.tensors.get(name)

    def failed(problem: str) -> TensorCheck:
        return TensorCheck(name, action, _module(changes), worst=float("inf"), problem=problem)

    if found is None:
        return failed("is missing from the artifact")
    stored = stored_dtype(own if own is not None else source)
    wanted = BY_TORCH_NAME[dtype] if dtype != "auto" and stored in FLOATS else stored
    if found.dtype != wanted:
        return failed(f"is stored as {found.dtype}, should be {wanted}")
    if found.shape != source.shape:
        return failed(f"has shape {list(found.shape)}, should have {list(source.shape)}")
    for piece in pieces:
        piece.check(source)
    return tuple(Job(name, found, source, part, action, owner) for part in parts_of(found.shape, changes, pieces))


def _module(changes: Sequence[Change]) -> str | None:
    """The module of a tensor that is one matrix."""
    modules = {change.trained.module for change in changes}
    return modules.pop() if len(modules) == 1 else None


def _summary(found_of: Sequence[tuple[Job, Sums]]) -> TensorCheck:
    """The check of a tensor from the sums over its parts."""
    jobs = [job for job, _ in found_of]
    total = found_of[0][1] if len(found_of) == 1 else sum((sums for _, sums in found_of), Sums())
    found, action, off, worst = jobs[0].found, jobs[0].action, total.off, total.worst
    problem = None
    if off:
        first, changes = total.first, jobs[0].part.changes
        width = (
            changes[0].into.shape[1] if len(jobs) == 1 and changes else found.shape[-1] if len(found.shape) == 2 else 0
        )
        where = f"[{first // width}, {first % width}]" if width else f"[{first}]"
        problem = f"{off} of {element_count(found.shape)} elements are off, the first at {where}"
        if action == "copy" and jobs[0].as_bytes:
            problem += "; the adapter does not touch it, it should be the base's bytes"
        else:
            problem += f", worst by {worst:.3g} steps of {found.dtype}"
    return TensorCheck(
        name=jobs[0].name,
        action=action,
        module=_module([change for job in jobs for change in job.part.changes]),
        elements=element_count(found.shape),
        worst=worst,
        off=off,
        kept=total.kept,
        update=total.update,
        problem=problem,
    )
