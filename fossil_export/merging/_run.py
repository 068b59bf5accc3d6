"""Follow a plan: stream every tensor from where it lies to where it goes, slab by slab.

An untouched range goes from the page cache to the device without being copied or decoded; what is computed on is
read slab by slab into buffers, so that memory does not grow with the model (a layout that cannot be cut, Conv1D's,
takes a weight at a time). Threads take slabs in any order; each
writes its own bytes, so the order does not show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._threads import in_order, one_blas_thread
from fossil_export.checkpoints._header import Header
from fossil_export.merging._engine import choose_engine
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._requantize import refuse_lost
from fossil_export.merging._slabs import CopySlab, Slab, slabs
from fossil_export.merging._survival import Survival
from fossil_export.merging._worker import Worker
from fossil_export.writing._output import OutputFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

THREADS = min(12, (os.cpu_count() or 1) + 6)
"""More than there are cores, since a thread waits while its slab is written."""

AHEAD = 4
"""Slabs that wait for each thread."""


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
    survival: dict[str, Survival] = {}
    with Writer(plan, device, progress) as runner:
        for file in plan.files:
            survival |= runner.write(file, folder / file.name)
    refuse_lost(plan, survival)
    return survival


class Writer:
    """Writes the files of a plan one by one; what `run` does for all of them. Close it, or use it in a `with`."""

    def __init__(
        self, plan: MergePlan, device: str = "cpu", progress: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._engine = choose_engine(device, plan.tensors)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *problem: object) -> None:
        self._engine.close()

    def write(self, file: FilePlan, path: Path, moved: Mapping[Path, Path] | None = None) -> dict[str, Survival]:
        """Write `file` at `path`. `moved` says where files lie that the plan has elsewhere."""
        output = OutputFile(path, file.size)
        return self._work(file, output, slabs(file), moved or {})

    def change(self, file: FilePlan, path: Path, base: Path) -> dict[str, Survival]:
        """Merge within `path`, a copy of the base's file `base` which has the layout of `file` (see `in_place`)."""
        # Through the page cache: what one slab writes and the next one reads are halves of one page.
        output = OutputFile(path, file.size, direct=False, existing=True)
        left = (slab for slab in slabs(file) if not (isinstance(slab, CopySlab) and slab.path == base))
        return self._work(file, output, left, {base: path})

    def _work(
        self,
        file: FilePlan,
        output: OutputFile,
        wanted: Iterable[Slab],
        moved: Mapping[Path, Path],
    ) -> dict[str, Survival]:
        worker = Worker(self._plan, self._engine, moved)
        try:
            with one_blas_thread(), ThreadPoolExecutor(THREADS) as pool:
                _write_file(file, output, wanted, worker, pool, self._progress)
            worker.check()
        finally:
            worker.close()
        merged = (tensor for tensor, _ in file.tensors if tensor.weight.changes and tensor.name in worker.measured)
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
    output: OutputFile,
    wanted: Iterable[Slab],
    worker: Worker,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> None:
    import numpy as np

    done = False

    def work(slab: Slab) -> None:
        worker.do(slab, output)
        progress(slab.nbytes)

    try:
        output.write(0, np.frombuffer(file.header, np.uint8))
        with closing(in_order(pool, (partial(work, slab) for slab in wanted), AHEAD * THREADS)) as results:
            for _ in results:
                pass
        done = True
    finally:
        output.close(sync=done)
