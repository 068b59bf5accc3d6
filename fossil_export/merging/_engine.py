"""The arithmetic of a slab of rows: widen, add the update, round once, see that it is finite.

Two engines with the same results (bat up to the order of its sums): NumPy for the CPU (PyTorch takes longer
to import than most merges take), PyTorch for GPUs and, where it is installed, for large float16 weights,
whose casts NumPy does in software.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.errors import MergeError, MissingExtraError
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._survival import Survival, group_rows, measure, sample_starts
from fossil_export.methods import Arrays, Method, Numbers

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SLOW_FLOAT16 = 1 << 28
# Elements from which importing PyTorch is repaid by its float16 casts (NumPy: 6 ns an element).


class Engine(Protocol):
    """Moves rows between NumPy views of raw bytes and the arrays it computes on."""

    block: int
    """Elements worked on at a time: what stays in the processor's cache, or fills a GPU."""

    def widen(self, rows: Array, dtype: str, copy: bool = True) -> Any:
        """`rows` as an array of `dtype` ("F32" or "F64"), row by row in memory, that may be changed if it is a copy.
        Whole numbers come as int64."""

    def round(self, wide: Any, out: Array) -> None:
        """Round `wide` to the dtype of the NumPy view `out` and store it there."""

    def numpy(self, array: Any) -> Array:
        """`array` as a NumPy array."""

    def close(self) -> None:
        """Undo what was set for the time of the merge."""


class NumpyEngine:
    block = 1 << 19

    def widen(self, rows: Array, dtype: str, copy: bool = True) -> Array:
        return rows.astype(numpy_dtype("I64" if rows.dtype.kind in "iu" else dtype), order="C", copy=copy)

    def round(self, wide: Array, out: Array) -> None:
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):  # infinities are found and named by the caller
            np.copyto(out, wide, casting="unsafe")

    def numpy(self, array: Array) -> Array:
        return array

    def close(self) -> None:
        pass


class TorchEngine:
    block = 1 << 22

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ImportError as problem:
            raise MissingExtraError("torch", "torch", f"--device {device}") from problem
        try:
            self._device = torch.device(device)
            torch.zeros(1, device=self._device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as problem:
            raise MergeError(
                f"device {device!r} is not available here ({str(problem).splitlines()[0]}); use --device cpu"
            ) from problem
        self._torch = torch
        # The merge brings its own threads; PyTorch's on top of them would take turns on the same cores.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # bat is a matrix product, and float32 must mean float32 on a GPU too.
        self._tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def close(self) -> None:
        self._torch.set_num_threads(self._threads)
        self._torch.backends.cuda.matmul.allow_tf32 = self._tf32

    def widen(self, rows: Array, dtype: str, copy: bool = True) -> Any:
        torch = self._torch
        wide = torch.float64 if dtype == "F64" else torch.float32
        wide = torch.int64 if rows.dtype.kind in "iu" else wide
        return self._tensor(rows).to(device=self._device, dtype=wide, copy=copy, memory_format=torch.contiguous_format)

    def round(self, wide: Any, out: Array) -> None:
        import numpy as np

        if wide.dtype == self._torch.float64 and out.dtype.itemsize == 2:
            # PyTorch goes by way of float32, which rounds twice.
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(out, wide.cpu().numpy(), casting="unsafe")
            return
        target = self._tensor(out)
        target.copy_(wide.to(target.dtype))

    def numpy(self, array: Any) -> Array:
        result: Array = array.cpu().numpy()
        return result

    def _tensor(self, rows: Array) -> Any:
        import warnings

        torch = self._torch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the base is mapped read-only, and only read
            if rows.dtype.name == "bfloat16":
                return torch.from_numpy(rows.view("i2")).view(torch.bfloat16)
            return torch.from_numpy(rows)


def choose_engine(device: str, tensors: tuple[TensorPlan, ...]) -> Engine:
    """The engine for `device` ("cpu", "cuda", "cuda:1", …). Raises MergeError where it is not available."""
    if device != "cpu":
        return TorchEngine(device)
    halves = sum(element_count(t.shape) for t in tensors if t.action == "merge" and "F16" in (t.dtype, t.source.dtype))
    if halves >= _SLOW_FLOAT16 and importlib.util.find_spec("torch") is not None:
        return TorchEngine("cpu")
    return NumpyEngine()


def compute_dtype(weight_dtype: str) -> str:
    """float32, as PEFT computes; float64 only for float64 weights."""
    return "F64" if weight_dtype == "F64" else "F32"


@dataclass(frozen=True)
class Update:
    """`weight` times the update of `method`; `arrays`, widened, are what the rows at hand need (`Method.part`)."""

    method: Method
    arrays: Arrays
    numbers: Numbers
    weight: float = 1.0

    @property
    def _numbers(self) -> Numbers:
        """With the weight in the scale, if there is one, as PEFT has it (`set_scale`)."""
        if "scale" not in self.numbers:
            return self.numbers
        return {**self.numbers, "scale": self.numbers["scale"] * self.weight}

    @property
    def _factor(self) -> float:
        """What the update must still be multiplied by."""
        return 1.0 if "scale" in self.numbers else self.weight

    def of(self, weight: Any, start: int) -> Any:
        """For rows that begin at row `start` of the slab."""
        found = self.method.update(weight, self.arrays, self._numbers, start)
        return found if self._factor == 1.0 else found * self._factor

    def add(self, weight: Any, start: int) -> None:
        """The same, to the rows themselves."""
        if self._factor == 1.0:
            self.method.add(weight, self.arrays, self._numbers, start)
        else:
            weight += self.of(weight, start)

    @property
    def block_rows(self) -> int:
        shapes = {role: tuple(array.shape) for role, array in self.arrays.items()}
        return int(self.numbers.get("block_rows") or self.method.block_rows(shapes))


def merge_slab(
    engine: Engine, stored: Any, out: Array, updates: Sequence[Update], start: int, out_features: int
) -> Survival:
    """`out` = round(`stored` + ΔW) for the rows (n, in) that begin at row `start` of a weight (out, in).

    `stored` and `out` are NumPy views in their stored dtypes; `stored` may be anything that gives such views when it is
    sliced, which is done once a block. Of several updates each sees what the ones before it gave, as in PEFT with
    several active adapters; there is one rounding. Returns the sums of the sampled rows. Whether `out` is finite is for
    the caller to see.
    """
    rows_together = math.lcm(*(update.block_rows for update in updates))
    group = group_rows(rows_together)
    # What takes the whole weight at once may be dear (a decomposition), and is computed once.
    at_once = rows_together >= out_features > 1
    step = max(1, engine.block // (group * stored.shape[1])) * group
    dtype = "F64" if stored.dtype.itemsize == 8 else "F32"
    sample = sample_starts(out_features, group)
    total = Survival()
    for first in range(0, len(stored), step):
        stop = min(first + step, len(stored))
        weight = _widened(engine, stored, first, stop, dtype)
        sampled: list[tuple[slice, Array, Array]] = []
        whole = engine.numpy(weight).copy() if at_once else None
        for row in () if at_once else _between(sample, start + first, start + stop):
            rows = slice(row - start - first, row - start - first + group)
            before = engine.numpy(weight[rows]).copy()
            sampled.append((rows, before, engine.numpy(_total(weight[rows], updates, row - start))))
        for one in updates:
            one.add(weight, first)
        if whole is not None:
            sampled.append((slice(None), whole, engine.numpy(weight) - whole))
        result = out[first:stop]
        engine.round(weight, result)
        for rows, before, update in sampled:
            total += measure(before, update, result[rows])
    return total


def _widened(engine: Engine, stored: Any, first: int, stop: int, dtype: str) -> Any:
    """Rows of `stored` to compute with; those that are decoded need not be narrowed before."""
    if isinstance(engine, NumpyEngine) and dtype == "F32" and isinstance(stored, CodedRows):
        weight = stored.wide(first, stop)
        if weight is not None:
            return weight
    return engine.widen(stored[first:stop], dtype)


def _total(weight: Any, updates: Sequence[Update], start: int) -> Any:
    """The sum of the updates of rows that begin at row `start` of the slab, and stay as they are."""
    total = updates[0].of(weight, start)
    for one in updates[1:]:
        total = total + one.of(weight + total, start)
    return total


def _between(sample: range, start: int, stop: int) -> range:
    """The members of `sample` in [start, stop)."""
    first = -(-(start - sample.start) // sample.step) * sample.step
    return range(first, min(stop, sample.stop), sample.step)


def is_finite(values: Array) -> bool:
    """Whether no element of a float array is infinite or NaN, told by its bits.

    Two reductions over integers; converting the values first would cost ten times as much.
    """
    import numpy as np

    if values.size == 0:
        return True
    size = values.dtype.itemsize
    infinity = {2: 0x7F80 if values.dtype.name == "bfloat16" else 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}[size]
    sign = 1 << (8 * size - 1)
    # The largest signed integer is the positive value furthest out, the largest unsigned one the negative.
    largest = values.view(f"i{size}").max()
    smallest = values.view(f"u{size}").max()
    return bool(largest < infinity and smallest < np.uint64(infinity | sign))
