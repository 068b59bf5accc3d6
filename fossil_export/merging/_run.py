"""Follow a plan: stream every tensor from where it lies to where it goes, slab by slab.

An untouched range goes from the page cache to the device without being copied or decoded; what is computed on is
read slab by slab into buffers, so that memory does not grow with the model (a layout that cannot be cut, Conv1D's,
takes a weight at a time). Threads take slabs in any order; each
writes its own bytes, so the order does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._log import log, timed
from fossil_export._threads import in_order, one_blas_thread
from fossil_export.checkpoints._header import Header
from fossil_export.checkpoints._source import by_address
from fossil_export.merging._engine import choose_engine
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._memory import bounds_of
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._slabs import CopySlab, Slab, slabs
from fossil_export.merging._survival import Survival
from fossil_export.merging._worker import Worker
from fossil_export.writing._output import OutputFile
from fossil_export.writing._sink import Output, Sink

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

AHEAD = 4
"""Slabs that wait for each thread; they hold no memory."""


@dataclass(frozen=True)
class FileResult:
    """A finished file of a plan: what `merge_file` gives and `finish` takes.

    `size` is in bytes, `survival` by merged tensor (see merging/_survival.py), `sha256` the hex digest of the whole
    file, if it was asked for.
    """

    name: str
    size: int
    survival: Mapping[str, Survival]
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` gives it back, to the bit."""
        return {**vars(self), "survival": {tensor: vars(sums) for tensor, sums in self.survival.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> FileResult:
        """Raises KeyError, TypeError or ValueError for what `to_dict` never gave."""
        survival = {str(tensor): Survival.from_dict(sums) for tensor, sums in found["survival"].items()}
        name, size, digest = found["name"], found["size"], found["sha256"]
        if not isinstance(name, str) or type(size) is not int or size < 0:
            raise ValueError("no file")
        if digest is not None and len(bytes.fromhex(digest)) != 32:
            raise ValueError("no SHA-256")
        return cls(name, size, survival, digest)


def merge_file(
    plan: MergePlan,
    file: FilePlan,
    sink: Sink,
    *,
    device: str = "cpu",
    hash: bool = False,  # noqa: A002
    progress: Callable[[int], None] = lambda nbytes: None,
) -> FileResult:
    """Write one of `plan.files` to `sink`; it needs no other, so that the files of a plan can be divided among
    processes and machines. When all are there, `finish` writes what goes beside them.

    The plan must be `settled` and the files that it needs at hand (`storage.fetch(*plan.needed)`). Arguments are those
    of `merge`. Raises MergeError for a plan that is not settled or a result that is not finite, naming the tensor,
    CheckpointError for a base that changed, and OSError if the sink refuses.
    """
    with Writer(plan, device, progress) as writer:
        return writer.write(file, sink, hash=hash)


def merge_files(
    plan: MergePlan,
    sink: Sink,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda nbytes: None,
    hash: bool = False,  # noqa: A002
) -> list[FileResult]:
    """The same for all of them, one after the other. `progress` is called with the bytes written, from several
    threads."""
    with Writer(plan, device, progress) as writer:
        return [writer.write(file, sink, hash=hash) for file in plan.files]


class Writer:
    """Writes the files of a plan one by one, by one engine; use it in a `with`."""

    def __init__(
        self, plan: MergePlan, device: str = "cpu", progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        plan.check_settled()
        self._plan = plan
        self._progress = progress
        self._engine, self._device = choose_engine(device), device

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *problem: object) -> None:
        self._engine.close()

    def write(
        self,
        file: FilePlan,
        sink: Sink,
        moved: Mapping[Path, Path] | None = None,
        hash: bool = False,  # noqa: A002
    ) -> FileResult:
        """Write `file` to `sink`. `moved` says where files lie that the plan has elsewhere."""
        with timed("wrote %s, %d bytes", file.name, file.size):
            survival = self._work(file, sink.create(file.name, file.size, hash), slabs(file), moved or {})
        return FileResult(file.name, file.size, survival, sink.sha256(file.name) if hash else None)

    def change(self, file: FilePlan, path: Path, base: Path) -> FileResult:
        """Merge within `path`, a copy of the base's file `base` which has the layout of `file` (see `in_place`)."""
        # Through the page cache: what one slab writes and the next one reads are halves of one page.
        output = OutputFile(path, file.size, direct=False, existing=True)
        left = (slab for slab in slabs(file) if not (isinstance(slab, CopySlab) and slab.path == base))
        return FileResult(file.name, file.size, self._work(file, output, left, {base: path}))

    def _work(
        self,
        file: FilePlan,
        output: Output,
        wanted: Iterable[Slab],
        moved: Mapping[Path, Path],
    ) -> dict[str, Survival]:
        bounds = bounds_of(file, self._engine.block)
        worker = Worker(self._plan, self._engine, moved, bounds.room)
        log.info("%s: merging on %s, %d threads", file.name, self._device, bounds.threads)
        try:
            # More threads than there are cores, since one waits while its slab is written.
            with by_address(self._plan.base.home), one_blas_thread(), ThreadPoolExecutor(bounds.threads) as pool:
                _write_file(file, output, wanted, worker, pool, bounds.threads, self._progress)
            worker.check()
        finally:
            worker.close()
        measured = worker.measured
        merged = (tensor for tensor, _ in file.tensors if tensor.weight.changes and tensor.name in measured)
        return {tensor.name: worker.survival(tensor) for tensor in merged}


def in_place(file: FilePlan, base: Header) -> bool:
    """Whether `file` is the base's file with other values: same header, every tensor where it was."""
    return file.header == base.encoded and all(
        tensor.encodes is None
        and (tensor.owner is not None or (tensor.source.path, tensor.source.offset) == (base.path, offset))
        for tensor, offset in file.tensors
    )


def _write_file(
    file: FilePlan,
    output: Output,
    wanted: Iterable[Slab],
    worker: Worker,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    import numpy as np

    done = False

    def work(slab: Slab) -> None:
        worker.do(slab, output)
        progress(slab.nbytes)

    try:
        output.write(0, np.frombuffer(file.header, np.uint8))
        with closing(in_order(pool, (partial(work, slab) for slab in wanted), AHEAD * threads)) as results:
            for _ in results:
                pass
        done = True
    finally:
        output.close(done)
