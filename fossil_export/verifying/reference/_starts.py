"""LoRA that began from another weight: W' = R + s · B A (or R + s · B diag(d) A, or DoRA of R), R made of W by its own
decomposition, in float64, and rounded to the dtype that W is stored in.

What the trainer computed in float32 may lie on the other side of a rounding. How far float32 is off depends on how
close the singular values lie, which no useful bound in advance tells; so the same is done in float32 (by PyTorch: NumPy
decomposes in float64 whatever it is given), and four times the worst difference is allowed before R is rounded. Where
both ends round to one number, nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export._extras import required
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference import _lora as lora
from fossil_export.verifying.reference._dora import lengthened
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SANE = 2.0**-8
# Of the largest weight: a float32 result further off is no guide to what float32 costs.


class Started:
    """`begun(linalg, weight, rank, scale)` is R before it is rounded, by NumPy's `linalg` or PyTorch's."""

    def begun(self, linalg: Any, weight: Any, rank: int, scale: float) -> Any:
        raise NotImplementedError

    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return tensors["B"].shape[0]

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        found = {**lora.part(arrays, start, stop)}
        if "m" in arrays:
            lengths = arrays["m"]
            found["m"] = lengths[start:stop] if len(lengths.shape) == 1 else lengths[:, start:stop]
        if "d" in arrays:
            found["d"] = arrays["d"][:]
        return found

    def rebuild(self, weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
        import numpy as np

        start, slack = weight, None
        if not numbers["brought"]:
            start, slack = self._rounded(weight, numbers)
        own = part if "d" not in part else {**part, "B": part["B"] * part["d"]}
        bound = lora.rebuild(start, own, numbers, exact)
        if "d" in part:
            bound *= 1 + 2 / (len(part["A"]) + 2)  # one more rounding of each product
        if slack is not None:
            bound += slack
        if "m" in part:
            bound = lengthened(exact, bound, part["m"].reshape(-1, 1), 1)
        # Beyond a power of two the steps are wider. What rounds from there lies as far off as that power at most, which
        # is within the bound on the other side.
        wider = np.frexp(np.abs(exact) + bound)[1] > np.frexp(exact)[1]
        bound[wider] *= 3
        return bound

    def _rounded(self, weight: Array, numbers: Mapping[str, Any]) -> tuple[Array, Array]:
        """The middle of what R may round to, and how far to either side it may lie."""
        import numpy as np

        rank, scale, dtype = int(numbers["r"]), float(numbers["scale"]), numpy_dtype(numbers["dtype"])
        torch = required("torch", "torch", "checking where training began")
        wide = self.begun(np.linalg, weight, rank, scale)
        narrow = self.begun(torch.linalg, torch.from_numpy(weight.astype(np.float32)), rank, scale).numpy()
        off = float(np.abs(narrow - wide).max())
        off = 4 * off if off <= _SANE * float(np.abs(weight).max()) else 0.0
        with np.errstate(over="ignore"):
            low, high = ((wide + side).astype(np.float32).astype(dtype).astype(np.float64) for side in (-off, off))
        return (low + high) / 2, (high - low) / 2

    def up(self, part: Arrays, numbers: Mapping[str, Any]) -> None:
        return None

    def down(self, arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
        return None


class Pissa(Started):
    """R is W without the r largest singular values."""

    def begun(self, linalg: Any, weight: Any, rank: int, scale: float) -> Any:
        left, values, right = linalg.svd(weight, full_matrices=False)
        return weight - (left[:, :rank] * values[:rank]) @ right[:rank]


class Olora(Started):
    """R is W less s times what the first r columns of Q make of the first r rows of R, W = Q R."""

    def begun(self, linalg: Any, weight: Any, rank: int, scale: float) -> Any:
        columns, rows = linalg.qr(weight)
        return weight - (columns[:, :rank] @ rows[:rank]) * scale


class Kasa(Started):
    """R is W without the r smallest singular values."""

    def begun(self, linalg: Any, weight: Any, rank: int, scale: float) -> Any:
        left, values, right = linalg.svd(weight, full_matrices=False)
        kept = len(values) - rank
        return (left[:, :kept] * values[:kept]) @ right[:kept]
