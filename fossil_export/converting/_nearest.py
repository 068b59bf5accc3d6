"""The nearest LoRA of an adapter whose update depends on the weight: a truncated SVD of each layer's update.

The update ΔW (out, in) of one layer at a time is built from the base's rows (methods/) and cut off. Where the
smaller side is short, its Gram matrix is decomposed, which gives the whole spectrum; on long sides the range is
sampled (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4 with two power iterations).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.converting._form import finite
from fossil_export.converting._options import Options
from fossil_export.converting._widths import Shapes
from fossil_export.errors import FossilExportError, MergeError, listed
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
    adapter: Adapter, shapes: Shapes, options: Options
) -> tuple[int, Iterator[tuple[str, Array, Array]], dict[str, Any]]:
    """The rank, the modules with A (r, in) and B (out, r) in float32, and the errors by module and in total.

    `options.rank` is the rank; `options.energy` asks for the smallest at which every layer keeps that share of
    the sum of its squared singular values. Raises FossilExportError for values that make no sense.
    """
    if options.rank is not None and options.energy is not None:
        raise FossilExportError("--rank and --energy say the same thing in two ways; give one")
    trained = adapter.trained
    others = [name for name in shapes if name not in trained or trained[name].dimensions not in (2, None)]
    if others:
        raise MergeError(f"{adapter.path}: changes {listed(others)}, for which LoRA has no place; merge it instead")
    smallest = min(min(shape) for shape in shapes.values())
    if options.rank is not None and not 1 <= options.rank <= smallest:
        raise FossilExportError(
            f"--rank is {options.rank}, expected 1 to {smallest}, the smallest side of a trained layer"
        )
    if options.energy is not None and not 0 < options.energy < 1:
        raise FossilExportError(f"--energy is {options.energy:g}, expected a share between 0 and 1, such as 0.99")
    updates = _Updates(adapter, options)
    rank = options.rank
    if rank is None:
        assert options.energy is not None
        rank = max(_rank_for(updates.of(module), options.energy) for module in shapes)
    cut: dict[str, tuple[Array, Array]] = {}
    modules: dict[str, float] = {}
    lost = total = 0.0
    for module in shapes:
        update = updates.of(module)
        first, second = truncated(update, rank)
        missing, whole = float(np.square(update - second @ first).sum()), float(np.square(update).sum())
        modules[module] = round((missing / whole) ** 0.5, 6) if whole else 0.0
        lost, total = lost + missing, total + whole
        cut[module] = (first, second)
    report = {"relative_error": round((lost / total) ** 0.5, 6) if total else 0.0, "relative_error_by_module": modules}
    return rank, ((module, *cut[module]) for module in shapes), report


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

    def __init__(self, adapter: Adapter, options: Options) -> None:
        if options.base_config is not None:
            raise MergeError(
                f"the update of a {adapter.variant} adapter depends on the base's weights; name the model with --base"
            )
        self._adapter = adapter
        plan = plan_merge(adapter, options.base)
        fetch(*plan.needed)
        self._plan = settled(plan)
        self._matrices = self._plan.matrices

    def _rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        return self._adapter.array(info, start, stop)

    def of(self, module: str) -> Array:
        """ΔW (out, in) in float32."""
        trained, matrix = self._adapter.trained[module], self._matrices[module]
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
