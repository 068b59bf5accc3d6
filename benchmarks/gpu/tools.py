"""Tensors as bytes, how far they are apart, and the folder that models are thrown away in."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, numpy_dtype
from gpu.cases import Difference

Array = np.ndarray[Any, Any]


def line_of(problem: BaseException) -> str:
    """An error as one line."""
    text = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def free() -> None:
    """Give the GPU's memory back, which models in reference cycles hold."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def arithmetic(threads: int | None) -> Iterator[None]:
    """No TF32, which would keep 10 of float32's 23 bits; on `threads` CPU threads, where that is given."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before, count = [setting.allow_tf32 for setting in settings], torch.get_num_threads()
    try:
        for setting in settings:
            setting.allow_tf32 = False
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(count)
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


class Scratch:
    """A folder of models that are thrown away; `written` and `peak` are bytes, brought up to date by `note`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written, self.peak = folder, 0, 0
        self._known: set[tuple[int, int, int]] = set()

    def note(self) -> None:
        """Count what has been written since the last call. A file linked twice counts once."""
        stats = [path.stat() for path in self.folder.rglob("*") if path.is_file()]
        now = {(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats}
        self.written += sum(size for _, _, size in now - self._known)
        self.peak = max(self.peak, sum(size for _, _, size in now))
        self._known = now

    def empty(self, name: str) -> Path:
        """A new folder, in place of what was there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def drop(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)


def stored(tensor: Any) -> Array:
    """A tensor as the NumPy array in its stored dtype that fossil-export works on."""
    bits = torch.int16 if tensor.element_size() == 2 else torch.int32
    array: Array = tensor.detach().cpu().contiguous().view(bits).numpy()
    return array.view(numpy_dtype(BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]))


def relative(found: Any, truth: Any) -> float:
    """|found - truth| / |truth|; infinite where it is not a number."""
    value = float((found.double() - truth).norm() / truth.norm())
    return math.inf if math.isnan(value) else value


def compare(one: Array, other: Array) -> Difference:
    """Two arrays of the same float dtype, bit for bit."""
    bits = np.dtype(f"i{one.dtype.itemsize}")
    a, b = one.view(bits).reshape(-1), other.view(bits).reshape(-1)
    apart = np.flatnonzero(a != b)
    if not len(apart):
        return Difference(0, a.size, 0)
    ordered = []
    for side in (a[apart], b[apart]):
        wide = side.astype(np.int64)
        ordered.append(np.where(wide < 0, -(wide & np.iinfo(bits).max), wide))
    return Difference(len(apart), a.size, int(np.abs(ordered[0] - ordered[1]).max()))


def compare_folders(one: Path, other: Path, dtype: str) -> Difference:
    """The weights files of two models all of whose tensors are of `dtype`; headers must be the same bytes."""
    total = Difference(0, 0, 0)
    kind, chunk = numpy_dtype(BY_TORCH_NAME[dtype]), 1 << 25
    names = sorted(file.name for file in one.glob("*.safetensors"))
    if not names or names != sorted(file.name for file in other.glob("*.safetensors")):
        raise ValueError(f"{one.name} and {other.name} do not hold the same weights files")
    for name in names:
        maps = [np.memmap(folder / name, np.uint8, "r") for folder in (one, other)]
        start = 8 + int(maps[0][:8].view("<u8")[0])
        if maps[0].size != maps[1].size or not np.array_equal(maps[0][:start], maps[1][:start]):
            raise ValueError(f"{one.name}/{name} and {other.name}/{name} have different headers")
        data = [part[start:].view(kind) for part in maps]
        for first in range(0, data[0].size, chunk):
            found = compare(data[0][first : first + chunk], data[1][first : first + chunk])
            total = Difference(
                total.elements + found.elements, total.total + found.total, max(total.steps, found.steps)
            )
    return total
