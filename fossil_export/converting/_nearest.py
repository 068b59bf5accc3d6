"""The nearest LoRA of a rank: a truncated SVD of each layer's update.

A module with a low-rank form B A is cut without its product (out, in): by QR B = Q R and Aᵀ = P S, so that B A =
Q (R Sᵀ) Pᵀ, and only R Sᵀ (r, r) is decomposed. Of one without (its update depends on the weight, or is of full rank)
the update ΔW (out, in) is built from the base's rows (methods/), one layer at a time, and cut off. Where the smaller
side is short, its Gram matrix is decomposed, which gives the whole spectrum; on long sides the range is sampled (Halko,
Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4 with two power iterations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._progress import counted
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.converting._form import Part, finite, matrices, refusal, without_form
from fossil_export.converting._options import Options
from fossil_export.converting._widths import Shapes
from fossil_export.errors import AdapterError, FossilExportError, MergeError, listed
from fossil_export.merging._change import weight_numbers
from fossil_export.merging._planning import plan_merge, settled
from fossil_export.methods import METHODS
from fossil_export.storage import fetch

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SHORT = 2048
"""Longest side whose Gram matrix is decomposed whole: 2048³ operations, some seconds."""

OVERSAMPLED, POWER_ITERATIONS = 16, 2


def nearest_lora(
    adapter: Adapter, parts: Sequence[Part], shapes: Shapes, options: Options
) -> tuple[int, dict[str, tuple[Array, Array]], dict[str, Any]]:
    """The rank, A and B in float32 of each part that is cut to it, as PEFT stores them, and the errors by module and in
    total. A part of no larger rank stays as it is; one with a shorter side gets no more than that.

    `options.rank` is the rank; `options.energy` asks for the smallest at which every layer keeps that share of
    the sum of its squared singular values. Raises FossilExportError for values that make no sense, AdapterError if
    nothing is cut.
    """
    if options.rank is not None and options.energy is not None:
        raise FossilExportError("--rank and --energy say the same thing in two ways; give one")
    if others := [name for name in shapes if name not in adapter.trained]:
        raise MergeError(f"{adapter.path}: changes {listed(others)}, for which a LoRA has no place; merge it instead")
    layers = [part for part in parts if part.kind != "bias"]
    smallest = min(min(shapes[part.name]) for part in layers)
    if options.rank is not None and not 1 <= options.rank <= smallest:
        raise FossilExportError(
            f"--rank is {options.rank}, expected 1 to {smallest}, the smallest side of a trained layer"
        )
    if options.energy is not None and not 0 < options.energy < 1:
        raise FossilExportError(f"--energy is {options.energy:g}, expected a share between 0 and 1, such as 0.99")
    strange = without_form(adapter, parts)
    updates = _Updates(adapter, options, strange) if strange else None

    def update_of(part: Part) -> _Dense | _Thin:
        if part.rank is not None:
            return _Thin.of(adapter, part, shapes[part.name])
        assert updates is not None
        return _Dense(updates.of(part.name))

    rank = options.rank
    if rank is None:
        assert options.energy is not None
        rank = max(
            update_of(part).rank_for(options.energy)
            for part in counted(layers, "finding the rank", len(layers), "modules")
        )
    if all(part.rank is not None and part.rank <= rank for part in layers):
        own = max(part.rank or 0 for part in layers)
        raise AdapterError(f"{adapter.path}: is a LoRA of rank {own} exactly; leave --rank and --energy out")
    cut: dict[str, tuple[Array, Array]] = {}
    modules: dict[str, float] = {}
    lost = total = 0.0
    for part in counted(layers, "cutting to the rank", len(layers), "modules"):
        update = update_of(part)
        first, second = update.truncated(rank)
        if part.rank is not None and part.rank <= rank:
            missing, whole = 0.0, update.square()
        else:
            missing, whole = update.missing(first, second), update.square()
            cut[part.name] = _stored(adapter, part, first, second)
        modules[part.module] = round((missing / whole) ** 0.5, 6) if whole else 0.0
        lost, total = lost + missing, total + whole
    report = {"relative_error": round((lost / total) ** 0.5, 6) if total else 0.0, "relative_error_by_module": modules}
    return rank, cut, report


def _stored(adapter: Adapter, part: Part, first: Array, second: Array) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) as PEFT stores them for this part."""
    if part.kind == "embedding":
        return np.ascontiguousarray(second.T), np.ascontiguousarray(first.T)
    if not part.own:
        return first, second
    shapes = adapter.trained[part.name].shapes
    return first.reshape(-1, *shapes["A"][1:]), second.reshape(*second.shape, *shapes["B"][2:])


@dataclass(frozen=True)
class _Thin:
    """An update of low rank, second · first, with first (r, in) and second (out, r) in float64."""

    first: Array
    second: Array

    @staticmethod
    def of(adapter: Adapter, part: Part, shape: tuple[int, int]) -> _Thin:
        first, second = (np.asarray(matrix, np.float64) for matrix in matrices(adapter, part, *shape))
        if part.kind == "embedding":
            first, second = second.T, first.T
        first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
        return _Thin(first, second * part.scale)

    def _parts(self) -> tuple[Array, Array, Array]:
        """Orthonormal (out, k), the singular values, orthonormal (k, in)."""
        left, upper = np.linalg.qr(self.second)
        right, lower = np.linalg.qr(self.first.T)
        inner, sizes, outer = np.linalg.svd(upper @ lower.T)
        count = len(sizes)
        return left @ inner[:, :count], sizes, outer[:count] @ right.T

    def _sizes(self) -> Array:
        upper, lower = np.linalg.qr(self.second)[1], np.linalg.qr(self.first.T)[1]
        return np.linalg.svd(upper @ lower.T, compute_uv=False)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps `energy` of the squared singular values."""
        squares = np.square(self._sizes())
        kept = np.cumsum(squares) / max(float(squares.sum()), 1e-300)
        return min(int(np.searchsorted(kept, energy)) + 1, len(kept))

    def truncated(self, rank: int) -> tuple[Array, Array]:
        left, sizes, right = self._parts()
        return right[:rank].astype(np.float32), (left[:, :rank] * sizes[:rank]).astype(np.float32)

    def missing(self, first: Array, second: Array) -> float:
        """‖second · first - this‖², as the norm of one product of twice the rank."""
        both = _Thin(np.vstack([self.first, first]), np.hstack([self.second, -second.astype(np.float64)]))
        return both.square()

    def square(self) -> float:
        return float(np.square(self._sizes()).sum())


@dataclass(frozen=True)
class _Dense:
    """An update (out, in) in float32."""

    update: Array

    def rank_for(self, energy: float) -> int:
        return _rank_for(self.update, energy)

    def truncated(self, rank: int) -> tuple[Array, Array]:
        return truncated(self.update, rank)

    def missing(self, first: Array, second: Array) -> float:
        return float(np.square(self.update - second @ first).sum())

    def square(self) -> float:
        return float(np.square(self.update).sum())


def truncated(update: Array, rank: int) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) in float32 with B A the best approximation of `update` (out, in) of rank r."""
    outputs, inputs = update.shape
    wide = update.astype(np.float64)
    if min(outputs, inputs) <= SHORT:
        # Eigenvectors of the smaller Gram matrix, the largest last.
        if inputs <= outputs:
            basis = np.linalg.eigh(wide.T @ wide)[1][:, : -rank - 1 : -1]  # (in, r)
            return basis.T.astype(np.float32), (wide @ basis).astype(np.float32)
        basis = np.linalg.eigh(wide @ wide.T)[1][:, : -rank - 1 : -1]  # (out, r)
        return (basis.T @ wide).astype(np.float32), basis.astype(np.float32)
    random = np.random.default_rng(0).standard_normal((inputs, min(rank + OVERSAMPLED, inputs)))
    span = np.linalg.qr(wide @ random)[0]
    for _ in range(POWER_ITERATIONS):
        span = np.linalg.qr(wide @ np.linalg.qr(wide.T @ span)[0])[0]
    small = span.T @ wide
    left, sizes, right = np.linalg.svd(small, full_matrices=False)
    return (sizes[:rank, None] * right[:rank]).astype(np.float32), (span @ left[:, :rank]).astype(np.float32)


def _rank_for(update: Array, energy: float) -> int:
    """The smallest rank that keeps `energy` of the squared singular values."""
    wide = update.astype(np.float64)
    total = float(np.square(wide).sum())
    if min(wide.shape) <= SHORT:
        gram = wide.T @ wide if wide.shape[1] <= wide.shape[0] else wide @ wide.T
        kept = np.cumsum(np.linalg.eigvalsh(gram)[::-1]) / max(total, 1e-300)
        return min(int(np.searchsorted(kept, energy)) + 1, len(kept))
    smallest, tried = int(min(wide.shape)), 16
    while tried < smallest:
        first, _ = truncated(update, tried)
        kept = np.cumsum(np.square(first.astype(np.float64)).sum(1)) / max(total, 1e-300)
        if kept[-1] >= energy:
            return int(np.searchsorted(kept, energy)) + 1
        tried *= 2
    return smallest


class _Updates:
    """The update of one module at a time, from the base's own weights."""

    def __init__(self, adapter: Adapter, options: Options, method: str) -> None:
        if options.base_config is not None:
            raise MergeError(
                f"the update of a {method} adapter depends on the base's weights, or is of full rank; name the model "
                "with --base"
            )
        self._adapter = adapter
        plan = plan_merge(adapter, options.base, into="original")
        fetch(*plan.needed)
        self._plan = settled(plan)
        self._matrices = self._plan.matrices

    def _rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        if info.coding is None and (info.offset is None or info.path in self._adapter.files):
            return self._adapter.array(info, start, stop)
        found: Array = read_rows(info, start, stop, partial(view_rows, self._plan.base.home))[:]
        return found

    def of(self, module: str) -> Array:
        """ΔW (out, in) in float32."""
        trained, matrix = self._adapter.trained[module], self._matrices[module]
        stored = matrix.stored[0].shape
        if len(stored) != 2 and element_count(stored) == element_count(matrix.shape):
            raise refusal(self._adapter, trained)  # a convolution, or a vector
        weight = np.asarray(matrix.read(self._rows, 0, matrix.shape[0])[:], np.float32)
        values = {role: _seen(array) for role, array in finite(self._adapter, module).items()}
        brought = any(name.startswith(f"{module}.") for name in self._adapter.saved)
        numbers = {**trained.numbers, **weight_numbers(matrix, matrix.dtype, brought)}
        update: Array = METHODS[trained.method].update(weight, values, numbers, 0)
        self._plan.check()
        return update


def _seen(array: Array) -> Array:
    """Trained values in float32; whole numbers stay."""
    return np.asarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)
