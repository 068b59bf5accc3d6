"""A slab of a stored tensor against what it must be, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._dtypes import BITS, element_count
from fossil_export.checkpoints.layouts import Rows
from fossil_export.merging._change import Change
from fossil_export.verifying._compiled import Factor, are_same, is_known, loops, multiplied, rebuilt, tiled
from fossil_export.verifying._files import Files
from fossil_export.verifying._job import TRAINED, Job, Piece, Sums
from fossil_export.verifying._rebuilding import Addend, rebuild
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._values import compare_values
from fossil_export.verifying.reference import EXACT

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

READ = 1 << 20
"""Bytes that are compared at a time."""


def compare(piece: Piece, added: Sum, files: Files, progress: Callable[[int], None]) -> Sums:
    found = _bytes(piece, files) if piece.job.as_bytes else _values(piece, added, files)
    progress(piece.nbytes)
    return found


def _bytes(piece: Piece, files: Files) -> Sums:
    """Equal to the last bit; the dtype may be one that has no arithmetic here."""
    import numpy as np

    job, total = piece.job, Sums()
    bits = BITS[job.found.dtype]
    size = max(1, bits // 8)
    first, _ = job.span
    for start in range(first + piece.start, first + piece.stop, READ):
        count = min(READ, first + piece.stop - start)
        want, found = (
            files.read(info, start, count, name) for info, name in ((job.source, "want"), (job.found, "got"))
        )
        same = are_same(want, found)
        if np.array_equal(_words(want), _words(found)) if same is None else same:
            continue
        wrong = (want.reshape(-1, size) != found.reshape(-1, size)).any(axis=1)
        total += Sums(float("inf"), int(wrong.sum()), first=(start + int(wrong.argmax()) * size) * 8 // bits)
    return total


def _words(raw: Array) -> Array:
    """The same bytes as wide integers where they divide, which compare faster."""
    import numpy as np

    return raw.view(np.uint64) if len(raw) % 8 == 0 else raw


def _values(piece: Piece, added: Sum, files: Files) -> Sums:
    import numpy as np

    job = piece.job
    check = _check(piece, added, files)
    addends: list[Addend] | None = None
    total, marks = Sums(), None
    for start, stop, stored, found in _blocks(piece, added, files):
        sums = check(start, stop, stored, found) if check is not None and is_known(stored, found) else None
        if sums is None:
            if addends is None:
                addends = [
                    addend(change, job, piece.start, piece.stop, added.adapters[change.adapter], files, piece)
                    for change in job.part.changes
                ]
            needed = [one.part(start - piece.start, stop - piece.start) for one in addends]
            with files.space() as space:
                sums, wrong = compare_values(job, start, stored, found, needed, space)
            if wrong is not None and job.in_order:
                row, column = divmod(int(wrong.argmax()), piece.width)
                sums += Sums(first=job.part.first + (start + row) * job.part.width + piece.first + column)
            elif wrong is not None:
                if marks is None:
                    marks = np.zeros((piece.stop - piece.start, piece.width), bool)
                marks[start - piece.start : stop - piece.start] = wrong
        total += sums
    return total if marks is None else total + Sums(first=_first(job, piece.start, marks))


def _blocks(piece: Piece, added: Sum, files: Files) -> Iterator[tuple[int, int, Array, Array]]:
    """Rows, as they are stored in the base and in the artifact, a few at a time."""
    job = piece.job
    if job.in_order:
        width = job.part.width
        for start, stop in piece.blocks():
            first = job.part.first + start * width + piece.first
            shape = (stop - start, piece.width)
            stored = files.columns(job.source, first, shape, width, "want")
            yield start, stop, stored, files.columns(job.found, first, shape, width, "got")
        return
    rows_of = files.rows(added.adapters[job.reader])
    if job.part.changes:
        stored = _whole(job.part.matrix_rows(rows_of, piece.start, piece.stop))
        found = _whole(job.part.matrix.moved(job.found).read(rows_of, piece.start, piece.stop))
    else:
        stored = _whole(job.part.unchanged_rows(job.source, rows_of, piece.start, piece.stop))
        found = _whole(replace(job.part, piece=None).unchanged_rows(job.found, rows_of, piece.start, piece.stop))
    for start, stop in piece.blocks():
        some = slice(start - piece.start, stop - piece.start)
        yield start, stop, stored[some], found[some]


def _whole(rows: Rows) -> Array:
    import numpy as np

    return np.ascontiguousarray(rows[:])


Check = Callable[[int, int, "Array", "Array"], "Sums | None"]
"""What compares rows [start, stop) as they are stored with those found; None if something is wrong with them."""


def _check(piece: Piece, added: Sum, files: Files) -> Check | None:
    """The compiled way to compare a piece, if there is one."""
    import numpy as np

    job = piece.job
    if loops() is None or "F64" in (job.part.dtype if job.part.changes else "", job.found.dtype, job.source.dtype):
        return None
    if not job.part.changes:
        nothing = np.zeros((1, 1), np.float32)
        return lambda start, stop, stored, found: tiled(0, stored.reshape(1, -1), found.reshape(1, -1), nothing, 0)
    change = job.part.changes[0]
    way = getattr(EXACT[change.trained.method], "COMPILED", None)
    if len(job.part.changes) == 1 and change.weight == 1.0 and way is not None and not change.trained.columns:
        arrays = {
            role: files.array(info, added.adapters[change.adapter]) for role, info in change.trained.tensors.items()
        }
        found = _WAYS[way](piece, change, arrays, files)
        if found is not None:
            return found
    addends = [
        addend(one, job, piece.start, piece.stop, added.adapters[one.adapter], files, piece) for one in job.part.changes
    ]

    def check(start: int, stop: int, stored: Array, found: Array) -> Sums | None:
        needed = [one.part(start - piece.start, stop - piece.start) for one in addends]
        with files.space() as space:
            weight, exact = space("space", 2 * 8 * found.size).view(np.float64).reshape(2, *found.shape)
            np.copyto(weight, stored)
            bound = rebuild(needed, weight, exact, False)
            return rebuilt(start, stored, found, exact, None if bound is None else np.ascontiguousarray(bound))

    return check


def _tiled(piece: Piece, change: Change, arrays: Mapping[str, Any], files: Files) -> Check:
    import numpy as np

    part = EXACT[change.trained.method].part(arrays, piece.start, piece.stop)
    tile = np.ascontiguousarray(part["D"].T, np.float32)
    return lambda start, stop, stored, found: tiled(start, stored, found, tile, start - piece.start)


def _product(piece: Piece, change: Change, arrays: Mapping[str, Any], files: Files) -> Check | None:
    import numpy as np

    rank = change.trained.tensors["A"].shape[0]
    if len(arrays["A"].shape) != 2 or rank * piece.width > 4 * TRAINED or not rank:
        return None
    key = (change.adapter, change.trained.tensors["A"].path, change.trained.tensors["A"].name, piece.first, piece.last)
    factor = files.factor(key, lambda: Factor(arrays["A"][:, piece.first : piece.last].T))
    left = np.ascontiguousarray(arrays["B"][piece.start : piece.stop], np.float32)
    scale = float(change.trained.numbers["scale"])
    return lambda start, stop, stored, found: multiplied(
        start, stored, found, left[start - piece.start : stop - piece.start], factor, scale, files.buffer
    )


def _in_blocks(piece: Piece, change: Change, arrays: Mapping[str, Any], files: Files) -> Check | None:
    import numpy as np

    rank = change.trained.tensors["B"].shape[1]
    blocks = arrays["B"][piece.start // rank : piece.stop // rank]
    if piece.width % rank:
        return None

    def check(start: int, stop: int, stored: Array, found: Array) -> Sums | None:
        total = Sums()
        weight = stored.astype(np.float32)
        for row in range(0, stop - start, rank):
            factor = Factor(blocks[(start + row - piece.start) // rank].T)
            some = slice(row, row + rank)
            sums = multiplied(
                start + row, stored[some], found[some], weight[some], factor, 1.0, files.buffer, blocks=True
            )
            if sums is None:
                return None
            total += sums
        return total

    return check


_WAYS: dict[str, Callable[[Piece, Change, Mapping[str, Any], Files], Check | None]] = {
    "tiled": _tiled,
    "product": _product,
    "blocks": _in_blocks,
}


def _first(job: Job, start: int, marks: Array) -> int:
    """The first marked element of rows that begin at row `start` of a part: of the matrix, where that is the whole
    tensor, else of the tensor."""
    if not job.part.changes or job.part.last - job.part.first == element_count(job.found.shape):
        return job.part.first + start * job.part.width + int(marks.argmax())
    stored = job.part.matrix.write(marks, start)
    return min(one.offset + int(one.values.argmax()) for one in stored if one.values.any())


def addend(
    change: Change, job: Job, start: int, stop: int, adapter: Adapter, files: Files, piece: Piece | None = None
) -> Addend:
    """What rows [start, stop) need of the trained tensors as the merge sees them (float32, but for float64 weights), in
    float64, for the columns of a `piece` or all; whole numbers in int64."""
    import numpy as np

    def seen(array: Array) -> Array:
        if array.dtype.kind in "iu":
            return array.astype(np.int64)
        return (array if job.part.dtype == "F64" else array.astype(np.float32)).astype(np.float64)

    trained = change.trained
    arrays = {role: trained.meant(role, files.array(info, adapter)) for role, info in trained.tensors.items()}
    exactly: Any = EXACT[trained.method]
    if piece is not None and not piece.is_whole:
        arrays = exactly.columns(arrays, piece.first, piece.last)
    part = exactly.part(arrays, start, stop)
    brought = job.owner is not None or job.part.piece is not None
    return Addend(change, {role: seen(array) for role, array in part.items()}, change.numbers(job.part.dtype, brought))
