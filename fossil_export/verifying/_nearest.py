"""The LoRA of an update that is none: how far B A is from it. The update is made of the base's rows, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._source import by_path
from fossil_export.merging._change import Part
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.verifying._comparison import addend
from fossil_export.verifying._files import Files
from fossil_export.verifying._job import Job
from fossil_export.verifying._rebuilding import rebuild

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SAME = 1e-5
"""Share of an update that float32 costs: A and B in it come out of a decomposition."""

_ROUNDED = 2.0**-22
"""Share of the weight that an update of float32 rows may be off by, as their difference."""


@dataclass(frozen=True)
class Nearest:
    """A and B as they are stored, and by what B A is scaled."""

    matrices: Sequence[TensorInfo]
    scale: float

    def update(self, adapter: Adapter) -> tuple[Array, Array]:
        """Float64 (out, r) and (r, in), whose product is ΔW."""
        import numpy as np

        first, second = (np.asarray(adapter.array(info), np.float64) for info in self.matrices)
        if self.matrices[0].name.endswith("embedding_A"):
            first, second = second.T, first.T
        return second.reshape(len(second), -1) * self.scale, first.reshape(len(first), -1)


def far_from(adapter: Adapter, plan: MergePlan, found: Mapping[str, Nearest]) -> dict[str, float]:
    """‖s B A - ΔW‖ / ‖ΔW‖ of the modules that are further from what was trained than float32 makes them."""
    headers = by_path((plan.base.home, plan.base.files), (adapter.home, adapter.headers))
    far: dict[str, float] = {}
    with Files(headers) as files:
        for tensor in plan.tensors:
            for part in tensor.parts:
                for module in [one.trained.module for one in part.changes if one.trained.module in found]:
                    off, update, weight = _squares(adapter, tensor, part, *found[module].update(adapter), files)
                    if not off <= (_SAME * math.sqrt(update) + _ROUNDED * math.sqrt(weight)) ** 2:  # NaN is far
                        far[module] = math.sqrt(off / update) if update else math.inf
        files.check()
    return far


def _squares(
    adapter: Adapter, tensor: TensorPlan, part: Part, up: Array, down: Array, files: Files
) -> tuple[float, float, float]:
    """‖up · down - ΔW‖², ‖ΔW‖² and ‖W‖² of a part with one change."""
    import numpy as np

    source, owner = tensor.origin(part)
    job = Job(tensor.name, source, source, part, tensor.action, owner)
    off = update = weight = 0.0
    for start, stop in job.slabs():
        rows = np.asarray(part.matrix_rows(files.rows(adapter), start, stop)[:], np.float64)
        exact = np.empty_like(rows)
        rebuild([addend(part.changes[0], job, start, stop, adapter, files)], rows, exact, part.dtype == "F64")
        exact -= rows
        off += float(np.square(up[start:stop] @ down - exact).sum())
        update, weight = update + float(np.square(exact).sum()), weight + float(np.square(rows).sum())
    return off, update, weight
