"""What the threads of a merge do with a slab: copy bytes, cast rows, add what was trained."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import FLOATS, element_count, numpy_dtype, stored_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._input import Reused, StoredArray, Window
from fossil_export.checkpoints._source import Source, Viewed, by_path, open_source
from fossil_export.checkpoints._stamp import changed
from fossil_export.checkpoints.layouts import Rows, Stored
from fossil_export.errors import MergeError
from fossil_export.merging._buffers import Buffers
from fossil_export.merging._change import Part
from fossil_export.merging._engine import Engine, NumpyEngine, Update, cast, compute_dtype, is_finite, merge_slab
from fossil_export.merging._infinite import became_infinite, damaged, diverged, overflow
from fossil_export.merging._kept import SMALL, Kept, Large
from fossil_export.merging._layout import TensorPlan, is_decoded
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._requantize import AT_ONCE, encode, part_of
from fossil_export.merging._slabs import SLAB, CopySlab, EncodeSlab, ManySlabs, RowsSlab, Slab, row_slabs
from fossil_export.merging._survival import Survival, sampled_share
from fossil_export.writing._output import ALIGNMENT
from fossil_export.writing._sink import Output

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


TINY = 64 << 10
"""Bytes of a trained tensor that is read with its neighbours for each of several small weights."""

WHOLE = 2
"""Weights, or rows of them that are quantized together, that are in memory at a time."""


class Worker:
    """What the threads share: open sources, buffers of each thread, the sums so far.

    `moved` says where files lie that the plan has elsewhere.
    """

    def __init__(self, plan: MergePlan, engine: Engine, moved: Mapping[Path, Path], room: int | None = None) -> None:
        self._adapters = plan.adapters
        self._tensors = plan.base.tensors
        self._engine = engine
        self._moved = moved
        adapters = ((adapter.home, adapter.headers) for adapter in plan.adapters)
        self._files = by_path((plan.base.home, plan.base.files), *adapters)
        self._sources: dict[Path, Source] = {}
        self._sums: dict[str, dict[int, dict[int, Survival]]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._buffer = Buffers()
        self._kept = Kept(room)
        self._encoded: dict[str, dict[int, Survival]] = {}
        self._whole = threading.Semaphore(WHOLE)
        self._large = threading.Lock()

    def check(self) -> None:
        """Raise CheckpointError where a source was written to since it was opened."""
        for source in self._sources.values():
            source.check()

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    @property
    def measured(self) -> set[str]:
        """The tensors whose survival is known."""
        return {*self._sums, *self._encoded}

    def survival(self, tensor: TensorPlan) -> Survival:
        """The sums over a merged tensor, added up in the order of its rows and taken for the whole of it."""
        if tensor.encodes is not None:
            rows = self._encoded[tensor.name]
            return sum((rows[start] for start in sorted(rows)), Survival())
        found, total = self._sums[tensor.name], Survival()
        for part in tensor.parts:
            if part.changes:
                sums = found[part.first]
                sampled = sum((sums[start] for start in sorted(sums)), Survival())
                total += sampled.scaled(1 / sampled_share(part.rows, part.sampled))
        return total

    def do(self, slab: Slab, output: Output) -> None:
        if isinstance(slab, CopySlab):
            self._copy(slab, output)
        elif isinstance(slab, EncodeSlab):
            with self._apart(slab), self._whole, self._kept.turn():
                self._encode(slab, output)
        elif isinstance(slab, ManySlabs):
            with self._kept.turn(), self._windows(slab):
                self._many(slab, output)
        else:
            with self._kept.turn():
                self._rows(slab, output)

    def _apart(self, slab: EncodeSlab) -> AbstractContextManager[Any]:
        """Of weights that cannot be cut, and take more memory, there is one at a time."""
        count = (slab.stop - slab.start) * self._width(slab)
        return self._large if count > 2 * AT_ONCE else nullcontext()

    def _width(self, slab: EncodeSlab) -> int:
        coding = self._tensors[slab.weight.name].coding
        assert coding is not None
        return coding.width

    def _many(self, slab: ManySlabs, output: Output) -> None:
        """Small slabs by one write."""
        import numpy as np

        written = self._buffer("written", slab.nbytes, slab.write_at)
        for one in slab.slabs:
            at = one.write_at - slab.write_at
            own = written[at : at + one.nbytes]
            if isinstance(one, CopySlab):
                self._file(one.path).read(one.read_at, own)
                continue
            out = own.view(numpy_dtype(one.tensor.dtype)).reshape(one.count, -1)
            self._fill(one, out)
            for stored in one.part.matrix.write(out, one.start) if one.part.changes else ():
                if stored.values is not out:
                    at = one.offset + stored.offset * out.dtype.itemsize - slab.write_at
                    values = np.ascontiguousarray(stored.values).reshape(-1).view(np.uint8)
                    if np.may_share_memory(values, own):
                        values = values.copy()
                    written[at : at + len(values)] = values
        output.write(slab.write_at, written)

    @contextmanager
    def _windows(self, slab: ManySlabs) -> Iterator[None]:
        """What small slabs read of a file, at once if it lies together."""
        spans: dict[Path, tuple[int, int, int]] = {}

        def wanted(path: Path, start: int | None, nbytes: int) -> None:
            if start is not None:
                first, last, total = spans.get(path, (start, start, 0))
                spans[path] = min(first, start), max(last, start + nbytes), total + nbytes

        for one in slab.slabs:
            if isinstance(one, CopySlab):
                wanted(one.path, one.read_at, one.nbytes)
                continue
            info, _ = one.tensor.origin(one.part)
            if info.coding is None:
                wanted(info.path, info.offset, info.nbytes)
            for change in one.part.changes:
                for trained in change.trained.tensors.values():
                    if trained.coding is None and trained.nbytes <= TINY:
                        wanted(trained.path, trained.offset, trained.nbytes)
        windows = {}
        for path, (first, last, total) in spans.items():
            if last - first <= min(2 * total, SLAB):
                windows[path] = Window(self._source(path), first, last - first)
        self._local.windows = windows
        try:
            yield
        finally:
            self._local.windows = {}

    def _file(self, path: Path) -> Source | Window:
        windows: dict[Path, Window] = getattr(self._local, "windows", {})
        return windows.get(path) or self._source(path)

    def _copy(self, slab: CopySlab, output: Output) -> None:
        source = self._source(slab.path)
        if (slab.read_at - slab.write_at) % ALIGNMENT or not isinstance(source, Viewed):
            buffer = self._buffer("written", slab.nbytes, slab.write_at)
            source.read(slab.read_at, buffer)
            output.write(slab.write_at, buffer)
            return
        data = source.view(slab.read_at, slab.nbytes)
        try:
            output.write(slab.write_at, data)
        except OSError as problem:
            if problem.errno == errno.EFAULT:  # pages that the file no longer has
                raise changed(slab.path) from problem
            raise
        finally:
            del data
        source.release(slab.read_at, slab.nbytes)

    def _rows(self, slab: RowsSlab, output: Output) -> None:
        import numpy as np

        tensor, part = slab.tensor, slab.part
        written = self._buffer("written", slab.nbytes, slab.write_at)
        out = written.view(numpy_dtype(tensor.dtype)).reshape(slab.count, -1)
        self._fill(slab, out)
        if not part.changes:
            output.write(slab.write_at, written)
            return
        for stored in part.matrix.write(out, slab.start):
            target = slab.offset + stored.offset * out.dtype.itemsize
            if stored.values is not out:  # what was read is not needed any more
                written = self._buffer("read", stored.values.nbytes, target)
                np.copyto(written.view(out.dtype).reshape(stored.values.shape), stored.values)
            output.write(target, written)

    def _fill(self, slab: RowsSlab, out: Array) -> None:
        """The rows of `slab`, as they are to be, into `out` (n, width)."""
        source, owner = slab.tensor.origin(slab.part)
        rows_of = partial(self._read, owner=owner)
        if slab.part.changes:
            self._merge(slab, slab.part.matrix_rows(rows_of, slab.start, slab.stop), out)
        else:
            self._cast(slab.tensor, slab.part, slab.part.unchanged_rows(source, rows_of, slab.start, slab.stop), out)

    def _encode(self, slab: EncodeSlab, output: Output) -> None:
        """Rows of a weight, merged in float32, quantized once."""
        import numpy as np

        weight = slab.weight
        whole = self._tensors[weight.name]
        assert whole.coding is not None
        coded = part_of(whole, slab.start, slab.stop)
        width = whole.coding.width
        first, last = slab.start * width, slab.stop * width
        values = np.empty(last - first, np.float32)
        for part in weight.parts:
            if part.last <= first or part.first >= last:
                continue
            for rows in row_slabs(weight, part, 0, (first, last)):
                out = np.empty((rows.count, part.width), np.float32)
                self._fill(rows, out)
                placed = part.matrix.write(out, rows.start) if part.changes else [Stored(rows.write_at // 4, out)]
                for stored in placed:
                    at = stored.offset - first
                    values[at : at + stored.values.size] = stored.values.reshape(-1)
        matrix = values.reshape(-1, width)
        flat = replace(coded, shape=matrix.shape)
        before = CodedRows(flat, self._codes, 0, len(matrix)) if weight.changes and not weight.brought else None
        found = encode(coded, before, matrix, self._codes)
        for info, offset in slab.tensors:
            raw = np.ascontiguousarray(found.tensors[info.name]).reshape(-1).view(np.uint8)
            written = self._buffer("written", len(raw), offset)
            np.copyto(written, raw)
            output.write(offset, written)
            if info.name == whole.coding.stored[0].name and before is not None:
                with self._lock:
                    self._encoded.setdefault(info.name, {})[slab.start] = found.survival

    def _read(self, info: TensorInfo, start: int, stop: int, *, owner: int | None) -> Rows:
        """Rows [start, stop) of the first axis of a tensor that the base or an adapter stores."""
        if info.coding is not None:
            return CodedRows(info, self._codes, start, stop)
        if info.offset is None:
            assert owner is not None
            return self._adapters[owner].array(info)[start:stop]
        shape, dtype = (stop - start, *info.shape[1:]), numpy_dtype(info.dtype)
        offset = info.offset + start * (info.nbytes // max(1, info.shape[0]))
        return StoredArray(self._file(info.path), offset, shape, dtype, partial(self._buffer, "read"))

    def _codes(self, info: TensorInfo, start: int, stop: int) -> StoredArray:
        """The same for what values are decoded from, each in memory of its own: several are needed at once. Of one, a
        slice is good until the next."""
        assert info.offset is not None
        shape, dtype = (stop - start, *info.shape[1:]), stored_dtype(info.dtype)
        offset = info.offset + start * (info.nbytes // max(1, info.shape[0]))
        return StoredArray(self._source(info.path), offset, shape, dtype, Reused())

    def _cast(self, tensor: TensorPlan, part: Part, stored: Rows, out: Array) -> None:
        """Rows as they are, in the dtype of `out`."""
        if isinstance(stored, CodedRows):
            for start, block in stored.blocks():
                self._cast(tensor, part, block, out[start : start + len(block)])
            return
        data = stored[:]
        if not cast(data, out):
            source, owner = tensor.origin(part)
            if not is_finite(data):
                if owner is not None:
                    raise MergeError(diverged(source))
                if is_decoded(source):
                    raise MergeError(damaged(source))
            if became_infinite(data, out):
                raise MergeError(overflow(tensor))

    def _merge(self, slab: RowsSlab, stored: Rows, out: Array) -> None:
        """The rows of `slab` with what was trained added, rounded into `out`."""
        import numpy as np

        tensor = slab.tensor
        dtype = compute_dtype(slab.part.dtype)
        updates = []
        brought = tensor.origin(slab.part)[1] is not None
        for change in slab.part.changes:
            tensors = change.trained.tensors
            trained = {
                role: change.trained.meant(role, self._trained(info, change.adapter, dtype))
                for role, info in tensors.items()
            }
            # Only what these rows need is widened: whole tensors of a high rank take more than the slabs do.
            part = change.method.part(trained, slab.start, slab.stop)
            wide = {role: self._widened(array, dtype) for role, array in part.items()}
            numbers = change.numbers(slab.part.dtype, brought)
            updates.append(Update(change.method, wide, numbers, change.weight))
        with np.errstate(over="ignore", invalid="ignore"):
            sums, finite = merge_slab(self._engine, stored, out, updates, slab.start, slab.part.rows)
        if not finite:
            raise MergeError(self._why_not_finite(tensor, slab.part, stored[:]))
        with self._lock:
            self._sums.setdefault(tensor.name, {}).setdefault(slab.part.first, {})[slab.start] = sums

    def _why_not_finite(self, tensor: TensorPlan, part: Part, data: Array) -> str:
        source, owner = tensor.origin(part)
        if not is_finite(data):
            if owner is not None:
                return diverged(source)
            return damaged(source)
        for change in tensor.changes:
            for info in change.trained.tensors.values():
                if info.dtype in FLOATS and not is_finite(self._adapters[change.adapter].array(info)):
                    return diverged(info)
        return overflow(tensor)

    def _trained(self, info: TensorInfo, adapter: int, dtype: str) -> Any:
        """The trained values: small ones in memory, as `dtype`; of large ones what is sliced is read."""
        if info.offset is None:
            return self._adapters[adapter].array(info)
        stored = self._stored(info)
        size = element_count(info.shape) * (8 if dtype == "F64" else 4)

        def whole() -> Any:
            if info.nbytes <= SMALL or not isinstance(self._engine, NumpyEngine) or info.dtype not in FLOATS:
                return self._widened(stored[:], dtype)
            return _by_rows(stored, numpy_dtype(dtype))

        if info.nbytes <= TINY and getattr(self._local, "windows", None):
            return whole()
        if info.nbytes <= SMALL:
            return self._kept.get((info, dtype), whole, size)
        return Large(stored, lambda: self._kept.get((info, dtype), whole, size))

    def _widened(self, array: Any, dtype: str) -> Any:
        """What the methods compute with, and do not write to."""
        return self._engine.widen(array, dtype, copy=False) if hasattr(array, "flags") else array

    def _stored(self, info: TensorInfo) -> StoredArray:
        assert info.offset is not None
        return StoredArray(self._file(info.path), info.offset, info.shape, numpy_dtype(info.dtype))

    def _source(self, path: Path) -> Source:
        with self._lock:
            if path not in self._sources:
                self._sources[path] = open_source(*self._files[path], self._moved.get(path))
            return self._sources[path]


def _by_rows(stored: StoredArray, dtype: np.dtype[Any]) -> Array:
    """All of a large tensor in another dtype, without all of it in its own."""
    import numpy as np

    found = np.empty(stored.shape, dtype)
    step = max(1, SMALL * len(stored) // max(1, found.nbytes))
    for start in range(0, len(stored), step):
        found[start : start + step] = stored[start : start + step]
    return found
