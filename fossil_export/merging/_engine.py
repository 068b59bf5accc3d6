"""The arithmetic of a slab of rows: widen, add the update, round once, see that it is finite.

Two engines with the same results (bat up to the order of its sums): NumPy for the CPU, with the compiled loops of
kernels/ where they are, and PyTorch for GPUs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export._extras import required
from fossil_export._spellings import cuda_missing, device_missing, device_named
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._rounding import rounded, widened
from fossil_export.errors import MergeError
from fossil_export.kernels import library
from fossil_export.kernels._rows import merge_rows
from fossil_export.merging._survival import Survival, group_rows, measure, sample_starts
from fossil_export.methods import Arrays, Method, Numbers
from fossil_export.methods._method import narrow_of

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


_CAST = 1 << 17
"""Elements that NumPy casts at a time: the integers that it takes for float16 stay in the cache."""


class Engine(Protocol):
    """Moves rows between NumPy views of raw bytes and the arrays it computes on."""

    block: int
    """Elements worked on at a time: what stays in the processor's cache, or fills a GPU."""

    @property
    def one_pass(self) -> bool:
        """Whether a sum that is rounded takes one pass."""

    def widen(self, rows: Array, dtype: str, copy: bool = True) -> Any:
        """`rows` as an array of `dtype` ("F32" or "F64"), row by row in memory, that may be changed if it is a copy.
        Whole numbers come as int64."""

    def begin(self, rows: Array, dtype: str) -> Any:
        """The same in memory that is used again for the next rows that this thread begins."""

    def space(self, use: str, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory of this thread for `use`, which is used again; None if that is not worth while."""

    def store(self, wide: Any, out: Array, update: Any = None) -> bool:
        """Round `wide`, plus an `update` of the same rows if there is one, to the dtype of the NumPy view `out` and
        store it there; `wide` is given away. Returns whether all of it is finite."""

    def numpy(self, array: Any) -> Array:
        """`array` as a NumPy array."""

    def close(self) -> None:
        """Undo what was set for the time of the merge."""


class NumpyEngine:
    block = 1 << 19

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def one_pass(self) -> bool:
        return library() is not None

    def widen(self, rows: Array, dtype: str, copy: bool = True) -> Array:
        import numpy as np

        if rows.dtype.itemsize == 2 and rows.dtype.kind not in "iu" and dtype == "F32" and rows.ndim == 2:
            wide = np.empty(rows.shape, np.float32)
            cast(rows, wide)
            return wide
        return rows.astype(numpy_dtype("I64" if rows.dtype.kind in "iu" else dtype), order="C", copy=copy)

    def begin(self, rows: Array, dtype: str) -> Array:
        if rows.ndim != 2 or rows.dtype.kind in "iu":
            return self.widen(rows, dtype)
        wide = self.space("wide", rows.shape, dtype)
        cast(rows, wide)
        return wide

    def space(self, use: str, shape: tuple[int, ...], dtype: str) -> Array:
        import numpy as np

        # Asked for anew, it would come page by page, which takes as long as the arithmetic.
        count, kind = math.prod(shape), numpy_dtype(dtype)
        found: Array | None = getattr(self._local, use, None)
        if found is None or found.nbytes < count * kind.itemsize:
            found = np.empty(count * kind.itemsize, np.uint8)
            setattr(self._local, use, found)
        return found[: count * kind.itemsize].view(kind).reshape(shape)

    def store(self, wide: Array, out: Array, update: Array | None = None) -> bool:
        if update is not None:
            if update.shape == wide.shape and merge_rows(wide, out, update):
                return True
            wide += update
        return cast(wide, out, spare=True)

    def numpy(self, array: Array) -> Array:
        return array

    def close(self) -> None:
        pass


class TorchEngine:
    block = 1 << 22
    one_pass = False

    def __init__(self, device: str) -> None:
        torch = required("torch", "torch", f"--device {device}")
        if line := cuda_missing(device, torch):
            raise MergeError(line)
        try:
            self._device = torch.device(device)
            torch.zeros(1, device=self._device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as problem:
            raise MergeError(device_missing(device, str(problem).splitlines()[0])) from problem
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

    def begin(self, rows: Array, dtype: str) -> Any:
        return self.widen(rows, dtype)

    def space(self, use: str, shape: tuple[int, ...], dtype: str) -> None:
        return None

    def store(self, wide: Any, out: Array, update: Any = None) -> bool:
        import numpy as np

        if update is not None:
            wide += update
        if wide.dtype == self._torch.float64 and out.dtype.itemsize == 2:
            # PyTorch goes by way of float32, which rounds twice.
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(out, wide.cpu().numpy(), casting="unsafe")
        else:
            target = self._tensor(out)
            target.copy_(wide.to(target.dtype))
        return is_finite(out)

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


def choose_engine(device: str) -> Engine:
    """The engine for `device` ("cpu", "cuda", "cuda:1", …). Raises MergeError where it is not available."""
    device = device_named(device, MergeError)
    return NumpyEngine() if device == "cpu" else TorchEngine(device)


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
    def plain(self) -> bool:
        """Whether `add` does no more than to add what `of` gives."""
        return self._factor != 1.0 or getattr(self.method.add, "plain", False)

    def narrow(self, start: int, count: int, out: Any = None) -> Any:
        """The update of `count` rows if it takes nothing of the weight, or columns of it to be repeated; else None.
        It may lie in `out`."""
        narrow = narrow_of(self.method)
        if narrow is None or not self.plain:
            return None
        found = narrow(self.arrays, self._numbers, start, count, out)
        return found if self._factor == 1.0 else found * self._factor

    @property
    def block_rows(self) -> int:
        shapes = {role: tuple(array.shape) for role, array in self.arrays.items()}
        return int(self.numbers.get("block_rows") or self.method.block_rows(shapes))


def merge_slab(
    engine: Engine, stored: Any, out: Array, updates: Sequence[Update], start: int, out_features: int
) -> tuple[Survival, bool]:
    """`out` = round(`stored` + ΔW) for the rows (n, in) that begin at row `start` of a weight (out, in).

    `stored` and `out` are NumPy views in their stored dtypes; `stored` may be anything that gives such views when it is
    sliced, which is done once a block. Of several updates each sees what the ones before it gave, as in PEFT with
    several active adapters; there is one rounding. Returns the sums of the sampled rows, and whether all of `out` is
    finite.
    """
    rows_together = math.lcm(*(update.block_rows for update in updates))
    group = group_rows(rows_together)
    # What takes the whole weight at once may be dear (a decomposition), and is computed once.
    at_once = rows_together >= out_features > 1
    step = max(1, engine.block // (group * stored.shape[1])) * group
    dtype = "F64" if stored.dtype.itemsize == 8 else "F32"
    sample = range(0) if at_once else sample_starts(out_features, group)
    total, finite = Survival(), True
    for first in range(0, len(stored), step):
        stop = min(first + step, len(stored))
        result = out[first:stop]
        starts = _between(sample, start + first, start + stop)
        spans = [slice(row - start - first, row - start - first + group) for row in starts]
        rows, given = _rows(engine, stored, first, stop, dtype)
        narrow = None
        if engine.one_pass and len(updates) == 1:
            narrow = updates[0].narrow(first, stop - first, engine.space("update", rows.shape, dtype))
        if narrow is not None and merge_rows(rows, result, narrow):
            befores = [engine.widen(rows[span], dtype, copy=False) for span in spans]
            sampled = [
                (span, before, engine.numpy(_total(before, updates, first + span.start)))
                for span, before in zip(spans, befores, strict=True)
            ]
        else:
            weight = rows if given else engine.begin(rows, dtype)
            whole = engine.numpy(weight).copy() if at_once else None
            sampled = [
                (
                    span,
                    engine.numpy(weight[span]).copy(),
                    engine.numpy(_total(weight[span], updates, first + span.start)),
                )
                for span in spans
            ]
            for one in updates[:-1]:
                one.add(weight, first)
            if engine.one_pass and updates[-1].plain and whole is None:
                finite &= engine.store(weight, result, updates[-1].of(weight, first))
            else:
                updates[-1].add(weight, first)
                if whole is not None:
                    sampled = [(slice(None), whole, engine.numpy(weight) - whole)]
                finite &= engine.store(weight, result)
        for span, before, update in sampled:
            total += measure(before, update, result[span])
    return total, finite


def cast(rows: Array, out: Array, spare: bool = False) -> bool:
    """`rows` (n, in), of which `spare` ones may be written to, in the dtype of `out`; whether all of it is finite."""
    import numpy as np

    if rows.shape == out.shape and rows.ndim == 2 and merge_rows(rows, out):
        return True
    step = max(1, _CAST // max(1, rows.shape[-1])) if rows.ndim == 2 else max(1, len(rows))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found and named by the caller
        for first in range(0, len(rows), step):
            values, result = rows[first : first + step], out[first : first + step]
            # NumPy's own casts of float16 take ten times as long.
            if values.dtype == np.float16 and result.dtype != np.float16:
                np.copyto(result, widened(values), casting="unsafe")
            elif values.dtype == np.float32 and result.dtype == np.float16:
                np.copyto(result, rounded(values if spare else values.copy(), "F16"))
            else:
                np.copyto(result, values, casting="unsafe")
    return is_finite(out)


def _rows(engine: Engine, stored: Any, first: int, stop: int, dtype: str) -> tuple[Any, bool]:
    """Rows of `stored`, and whether they may be computed with as they are: those that are decoded need not be narrowed
    before."""
    if isinstance(engine, NumpyEngine) and dtype == "F32" and isinstance(stored, CodedRows):
        wide = stored.wide(first, stop)
        if wide is not None:
            return wide, True
    return stored[first:stop], False


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
