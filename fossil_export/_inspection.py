"""What an adapter holds and what it would do to its base, read from headers, configs and the shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints._dtypes import TORCH_NAME
from fossil_export.errors import FossilExportError, HubError
from fossil_export.merging import MergePlan, plan_merge
from fossil_export.merging._layout import tensor_record
from fossil_export.merging._planning import find_base


@dataclass(frozen=True)
class Inspection:
    """`norms` is the Frobenius norm of each module's trained tensors, empty while the adapter is on the Hub alone;
    `plan` is None where the merge would stop, and `problems` then says why. Without a base at hand both stay empty."""

    adapter: Adapter
    norms: Mapping[str, float]
    plan: MergePlan | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Inspection of {self.adapter!r}: {'; '.join(self.problems) or self.plan or 'base not looked at'}>"

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        adapter = self.adapter
        return {
            "adapter": adapter.name,
            "revision": adapter.revision,
            "peft_type": adapter.peft_type,
            "variant": adapter.variant,
            "rank": adapter.rank,
            "mini_r": adapter.config.get("mini_r") if adapter.variant == "mini" else None,
            "base_model": adapter.base_model,
            "parameters": adapter.parameters,
            "dtypes": dtypes(adapter),
            "modules": [
                {
                    "module": trained.module,
                    "shard": info.name,
                    "shape": list(info.shape),
                    "dtype": TORCH_NAME.get(info.dtype, info.dtype),
                    "norm": _finite(self.norms.get(trained.module, math.nan)),
                }
                for trained in adapter.trained.values()
                for info in trained.tensors.values()
            ],
            "saved": [
                {"tensor": info.name, "shape": list(info.shape), "dtype": TORCH_NAME.get(info.dtype, info.dtype)}
                for info in adapter.saved.values()
            ],
            "base_tensors": None
            if self.plan is None
            else [tensor_record(tensor) for tensor in self.plan.tensors if tensor.action not in ("copy", "cast")],
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


def inspect(adapter: Adapter | str | Path, base: str | Path | None = None) -> Inspection:
    """Look at `adapter`, and at `base` where there is one (default: the adapter's own, if it can be had); paths or ids
    on the Hub, of which only headers are read.

    Raises AdapterError for an adapter that cannot be read; what would stop a merge is reported in `problems`.
    """
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    norms = {module: _norm(adapter, module) for module in adapter.trained} if adapter.is_here else {}
    problems = [
        f"{adapter.trained[module].label} holds infinite or NaN values"
        for module, norm in norms.items()
        if not math.isfinite(norm)
    ]
    plan = None
    warnings = adapter.notes
    found = None
    try:
        found = find_base(adapter, base) if base is not None or adapter.base_model is not None else None
        if found is not None:
            plan = plan_merge(adapter, found)
            warnings = plan.warnings
    except FossilExportError as problem:
        if base is None and (found is None or isinstance(problem, HubError)):  # the adapter can be looked at without
            warnings += (f"the base was not looked at: {problem}",)
        else:
            problems.append(str(problem))
    return Inspection(adapter, norms, plan, tuple(problems), warnings)


def dtypes(adapter: Adapter) -> dict[str, int]:
    """Number of trained tensors by dtype."""
    tensors = (info for trained in adapter.trained.values() for info in trained.tensors.values())
    return dict(Counter(TORCH_NAME.get(info.dtype, info.dtype) for info in tensors))


def _norm(adapter: Adapter, module: str) -> float:
    import numpy as np

    wide = [array.astype(np.float64) for array in adapter.arrays(module).values() if array.dtype.kind != "i"]
    return float(np.sqrt(sum((values * values).sum() for values in wide)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN
