"""Follow a plan: stream every tensor from where it lies to where it goes, slab by slab.

The base is mapped, not read: an untouched range goes from the page cache to the device without being
copied or decoded, and mapped pages are given back slab by slab, so that memory does not grow with the
model. Threads take slabs in any order; each writes its own bytes, so the order does not show.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.dtypes import element_count, numpy_dtype
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.checkpoints.output import ALIGNMENT, OutputFile
from fossil_export.errors import CheckpointError, MergeError
from fossil_export.merging.engine import Engine, choose_engine, compute_dtype, is_finite, merge_slab
from fossil_export.merging.layout import FilePlan, TensorPlan
from fossil_export.merging.plan import MergePlan
from fossil_export.merging.survival import Survival, sample_starts
from fossil_export.methods import METHODS

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SLAB = 8 << 20
"""Bytes written at a time."""

THREADS = min(8, (os.cpu_count() or 1) + 4)
"""More than there are cores, since a thread waits while its slab is written."""


@dataclass(frozen=True)
class _Copy:
    """Bytes taken as they are: `source` offset in `path` to `target` offset in the file being written."""

    path: Path
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class _Rows:
    """Rows [start, stop) of one tensor that is merged, cast or comes from a pickled adapter."""

    tensor: TensorPlan
    start: int
    stop: int
    target: int


def run(
    plan: MergePlan,
    folder: Path,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Survival]:
    """Write the weights files of `plan` into `folder`, synced, and return the survival of each merged tensor.

    `progress` is called with the bytes written, from several threads. Raises MergeError for a result that
    is not finite, naming the tensor, and OSError when the disk refuses.
    """
    engine = choose_engine(device, plan.tensors)
    worker = _Worker(plan, engine)
    parts: dict[str, list[tuple[int, Survival]]] = {}
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for file in plan.files:
                _write_file(file, folder / file.name, worker, pool, progress, parts)
    finally:
        worker.close()
    totals = {}
    for tensor in plan.tensors:
        if tensor.shard is not None:
            sums = sum((part for _, part in sorted(parts[tensor.name], key=lambda part: part[0])), Survival())
            totals[tensor.name] = sums.scaled(_sampling(tensor))
    return totals


def _write_file(
    file: FilePlan,
    path: Path,
    worker: _Worker,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
    parts: dict[str, list[tuple[int, Survival]]],
) -> None:
    import numpy as np

    output = OutputFile(path, file.size)
    futures: list[Future[None]] = []
    done = False
    stop = threading.Event()
    try:
        output.write(0, np.frombuffer(file.header, np.uint8))

        def work(step: _Copy | _Rows) -> None:
            if stop.is_set():
                return
            if isinstance(step, _Copy):
                worker.copy(step, output)
                progress(step.nbytes)
            else:
                part = worker.rows(step, output)
                if part is not None:
                    parts.setdefault(step.tensor.name, []).append((step.start, part))
                progress(_row_bytes(step.tensor) * (step.stop - step.start))

        futures = [pool.submit(work, step) for step in _steps(file)]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        done = True
    finally:
        stop.set()
        wait(futures)
        output.close(sync=done)


def _steps(file: FilePlan) -> Iterator[_Copy | _Rows]:
    """Cut a file into slabs in the order of the file; neighbouring untouched tensors become one range."""
    pending: _Copy | None = None
    for tensor, offset in file.tensors:
        if tensor.nbytes == 0:
            continue
        source = tensor.source.offset
        if tensor.shard is not None or tensor.dtype != tensor.source.dtype or source is None:
            yield from _slabs(tensor, offset)
            continue
        path = tensor.source.path
        if (
            pending
            and pending.path == path
            and pending.source + pending.nbytes == source
            and pending.target + pending.nbytes == offset
        ):
            pending = _Copy(path, pending.source, pending.target, pending.nbytes + tensor.nbytes)
            continue
        if pending:
            yield from _ranges(pending)
        pending = _Copy(path, source, offset, tensor.nbytes)
    if pending:
        yield from _ranges(pending)


def _ranges(whole: _Copy) -> Iterator[_Copy]:
    """Cut at multiples of the slab in the target, so that only the outer ends are partial pages."""
    end = whole.target + whole.nbytes
    start = whole.target
    while start < end:
        stop = min(end, (start // SLAB + 1) * SLAB)
        yield _Copy(whole.path, whole.source + start - whole.target, start, stop - start)
        start = stop


def _slabs(tensor: TensorPlan, offset: int) -> Iterator[_Rows]:
    rows = _rows(tensor)
    unit = METHODS[tensor.shard.variant].block_rows(tensor.shard.tensor.shape) if tensor.shard is not None else 1
    size = _row_bytes(tensor)
    step = max(1, SLAB // (size * unit)) * unit
    for start in range(0, rows, step):
        yield _Rows(tensor, start, min(start + step, rows), offset + start * size)


def _rows(tensor: TensorPlan) -> int:
    """A matrix is cut by rows, everything else by elements."""
    return tensor.shape[0] if len(tensor.shape) == 2 else element_count(tensor.shape)


def _row_bytes(tensor: TensorPlan) -> int:
    return tensor.nbytes // _rows(tensor)


def _sampling(tensor: TensorPlan) -> float:
    assert tensor.shard is not None
    unit = METHODS[tensor.shard.variant].block_rows(tensor.shard.tensor.shape)
    return tensor.shape[0] / (len(sample_starts(tensor.shape[0], unit)) * unit)


class _Worker:
    """What the threads share: mapped sources, the shards in use, and a buffer for each thread."""

    def __init__(self, plan: MergePlan, engine: Engine) -> None:
        self._adapter = plan.adapter
        self._engine = engine
        self._sources: dict[Path, _Source] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        # Slabs of one weight follow each other: as many shards as threads are ever in use.
        self._shard = lru_cache(maxsize=THREADS + 1)(self._load_shard)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def copy(self, step: _Copy, output: OutputFile) -> None:
        source = self._source(step.path)
        data = source.view(step.source, step.nbytes)
        if (data.ctypes.data - step.target) % ALIGNMENT:
            buffer = self._buffer(step.nbytes, step.target)
            buffer[:] = data
            output.write(step.target, buffer)
        else:
            output.write(step.target, data)
        del data
        source.release(step.source, step.nbytes)

    def rows(self, step: _Rows, output: OutputFile) -> Survival | None:
        tensor = step.tensor
        count = step.stop - step.start
        out_bytes = self._buffer(count * _row_bytes(tensor), step.target)
        out = out_bytes.view(numpy_dtype(tensor.dtype)).reshape(count, -1)
        source_row = tensor.source.nbytes // _rows(tensor)
        first, length = step.start * source_row, count * source_row
        if tensor.source.offset is None:
            flat = self._adapter.array(tensor.source).reshape(_rows(tensor), -1)
            part = self._fill(step, flat[step.start : step.stop], out)
        else:
            source = self._source(tensor.source.path)
            data = source.view(tensor.source.offset + first, length)
            part = self._fill(step, data.view(numpy_dtype(tensor.source.dtype)).reshape(count, -1), out)
            del data
            source.release(tensor.source.offset + first, length)
        output.write(step.target, out_bytes)
        return part

    def _fill(self, step: _Rows, data: Array, out: Array) -> Survival | None:
        tensor = step.tensor
        if tensor.shard is None:
            self._engine_cast(data, out)
            if not is_finite(out) and is_finite(data):
                raise MergeError(f"{tensor.name}: overflows {out.dtype.name}; choose --dtype bfloat16 or float32")
            return None
        shard = self._shard(tensor.shard.tensor, tensor.source.dtype)
        part = merge_slab(self._engine, data, out, shard, tensor.shard.variant, step.start, tensor.shape[0])
        if not is_finite(out):
            raise MergeError(self._why_not_finite(tensor, data))
        return part

    def _engine_cast(self, data: Array, out: Array) -> None:
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, data, casting="unsafe")

    def _why_not_finite(self, tensor: TensorPlan, data: Array) -> str:
        assert tensor.shard is not None
        if not is_finite(data):
            return f"{tensor.source.path}: {tensor.source.name} holds infinite or NaN values; the base is damaged, fetch it again"
        if not is_finite(self._adapter.array(tensor.shard.tensor)):
            return f"{tensor.shard.tensor.path}: {tensor.shard.tensor.name} holds infinite or NaN values; the training diverged, take an earlier checkpoint"
        return f"{tensor.name}: the merged weight overflows {numpy_dtype(tensor.dtype).name}; choose --dtype bfloat16 or float32"

    def _load_shard(self, info: TensorInfo, weight_dtype: str) -> Any:
        array = self._adapter.array(info)
        flat = array.reshape(array.shape[0], -1)
        return self._engine.widen(flat, compute_dtype(weight_dtype)).reshape(array.shape)

    def _source(self, path: Path) -> _Source:
        with self._lock:
            if path not in self._sources:
                self._sources[path] = _Source(path)
            return self._sources[path]

    def _buffer(self, nbytes: int, target: int) -> Array:
        """This thread's buffer, at an address that suits writing to offset `target` past the page cache."""
        import numpy as np

        room = nbytes + 2 * ALIGNMENT
        whole: Array | None = getattr(self._local, "buffer", None)
        if whole is None or len(whole) < room:
            whole = np.frombuffer(mmap.mmap(-1, max(room, SLAB + 2 * ALIGNMENT)), np.uint8)
            self._local.buffer = whole
        start = target % ALIGNMENT
        return whole[start : start + nbytes]


class _Source:
    """A file mapped read-only, of which parts are looked at and let go."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from problem
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)

    def view(self, offset: int, nbytes: int) -> Array:
        import numpy as np

        return np.frombuffer(self._map, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Take the pages that lie wholly in the range out of this process's memory."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still referenced by an exception in flight; the map goes with it
