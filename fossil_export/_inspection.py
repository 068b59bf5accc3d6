"""What an adapter holds and what it would do to its base, read from headers, configs and the shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fossil_export._grouping import grouped
from fossil_export._progress import Shown, counted, reporting
from fossil_export._shown import line, table
from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints._dtypes import TORCH_NAME
from fossil_export.errors import FossilExportError, HubError
from fossil_export.merging import MergePlan, plan_merge
from fossil_export.merging._layout import tensor_record
from fossil_export.merging._planning import find_base
from fossil_export.merging._provenance import ratio_record
from fossil_export.merging._quantization_error import by_kind, ratio_warnings
from fossil_export.merging._sizes import Size, sizes_of


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found of an adapter.

    Attributes:
        adapter: The `Adapter`.
        norms: By module, the Frobenius norm of what was trained; empty while the adapter is on the Hub alone.
        plan: The `MergePlan`; None if the merge would stop, or without a base at hand.
        problems: What would stop a merge, a line each.
        warnings: Lines that the user should see.
        sizes: By module, how large each update, or whole tensor, is beside the weight that it changes.
    """

    adapter: Adapter
    norms: Mapping[str, float]
    plan: MergePlan | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    sizes: Mapping[str, Size] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The modules and whole tensors, by kind: those that differ in nothing but the numbers in their names."""
        return _kinds(self)

    def __repr__(self) -> str:
        if self.problems:
            found = self.problems[0] + (f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else "")
        else:
            found = repr(self.plan) if self.plan is not None else "base not looked at"
        return line("Inspection", f"of {self.adapter!r}: {found}")

    def _repr_html_(self) -> str:
        rows = [
            ("method", self.adapter.variant),
            ("rank", self.adapter.rank or None),
            ("modules", len(self.adapter.trained)),
            ("parameters", f"{self.adapter.parameters:,}"),
            ("base", self.plan.base_name if self.plan is not None else self.adapter.base_shown),
            (
                "a merge",
                "would stop" if self.problems else "would go through" if self.plan is not None else "was not planned",
            ),
            ("of the model", f"{self.plan.merged} of {self.plan.parameters} tensors change" if self.plan else None),
        ]
        said = [*(f"would stop a merge: {one}" for one in self.problems), *self.warnings]
        return table(f"Inspection of {self.adapter.name or self.adapter.path}", rows, said, "Notes")

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        adapter = self.adapter
        return {
            "adapter": adapter.name,
            "revision": adapter.revision,
            "peft_type": adapter.peft_type,
            "variant": adapter.variant,
            "rank": adapter.rank,
            "methods": dict(Counter(one.method for one in adapter.trained.values())),
            "kinds": [kind.to_dict() for kind in self.kinds],
            "mini_r": adapter.config.get("mini_r") if adapter.variant == "mini" else None,
            "base_model": adapter.base_shown,
            "parameters": adapter.parameters,
            "dtypes": dtypes(adapter),
            "modules": [
                {
                    "module": trained.module,
                    "method": trained.method,
                    "rank": trained.rank or None,
                    "scale": trained.numbers.get("scale"),
                    "shard": info.name,
                    "shape": list(info.shape),
                    "dtype": TORCH_NAME.get(info.dtype, info.dtype),
                    "norm": _finite(self.norms.get(trained.module, math.nan)),
                    "change": _size_record(self.sizes.get(trained.module)),
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
            else [
                tensor_record(tensor)
                for tensor in self.plan.tensors
                if tensor.action not in ("copy", "cast", "dequantize")
            ],
            **(
                {"trained_on": self.plan.seen.record(), "quantization": ratio_record(by_kind(self.sizes))}
                if self.plan is not None and self.plan.trained_on is not None
                else {}
            ),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


@reporting
def inspect(adapter: Adapter | str | Path, base: str | Path | None = None, *, progress: Shown = False) -> Inspection:
    """Look at an adapter, and at what it would do to its base.

    What would stop a merge is no error, but among the `problems`. Nothing is written.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder").
        base: The base model, of which headers are read: a folder, an address or an id on the Hub. Default: the one that
            the adapter names, if it can be had.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        Inspection: `adapter`, `plan` (None if a merge would stop), `problems` (what would stop it), `warnings`, `norms`
            and `sizes` by module, `kinds` (modules by kind), and `to_dict()`.

    Raises:
        AdapterError: The adapter cannot be read.
        HubError: The Hub refuses or cannot be reached.
        TypeError: If `progress` is neither a bool nor a function.

    Example:
        >>> import fossil_export
        >>> found = fossil_export.inspect("my-adapter")  # doctest: +SKIP
        >>> found.problems  # doctest: +SKIP
        ()
    """
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    modules = counted(adapter.trained, "reading the adapter", len(adapter.trained), "modules")
    norms = {module: _norm(adapter, module) for module in modules} if adapter.is_here else {}
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
    sizes = sizes_of(plan) if plan is not None and not problems else {}
    if plan is not None:
        warnings += tuple(ratio_warnings(plan, by_kind(sizes)))
    return Inspection(adapter, norms, plan, tuple(problems), warnings, sizes)


@dataclass(frozen=True)
class Kind:
    """Modules, or whole tensors, of a kind: `name` with ranges in the place of numbers, `method` ("whole" for tensors
    that replace the base's), the shapes of what was trained, the base's tensors, and the sizes that are known."""

    name: str
    method: str
    rank: int
    scale: float | None
    shapes: str
    tensor: str
    members: tuple[str, ...]
    sizes: tuple[Size, ...]

    @property
    def ratios(self) -> list[float]:
        return [size.ratio for size in self.sizes if size.ratio is not None]

    @property
    def ratio(self) -> float | None:
        """Of all of them together."""
        known = [size for size in self.sizes if size.ratio is not None]
        update = math.fsum((size.update or 0.0) ** 2 for size in known)
        weight = math.fsum((size.weight or 0.0) ** 2 for size in known)
        return math.sqrt(update / weight) if weight else None

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        known = [size.update for size in self.sizes if size.update is not None]
        update = math.sqrt(math.fsum(value * value for value in known)) if known else math.nan
        return {
            "kind": self.name,
            "method": self.method,
            "rank": self.rank or None,
            "scale": self.scale,
            "shapes": self.shapes,
            "base_tensor": self.tensor,
            "modules": len(self.members),
            "change": {
                "update": _finite(update),
                "ratio": self.ratio,
                "least": min(self.ratios, default=None),
                "most": max(self.ratios, default=None),
                "share_read": min((size.share for size in self.sizes), default=None),
            },
        }


def _kinds(found: Inspection) -> tuple[Kind, ...]:
    adapter = found.adapter
    touched = (
        {module: tensor.name for module, tensor in (found.plan.modules | found.plan.rows).items()}
        if found.plan is not None
        else {}
    )
    rows: list[tuple[str, ...]] = []
    names: list[str] = []
    numbers: list[tuple[int, float | None]] = []
    for module, trained in adapter.trained.items():
        shapes = " + ".join("x".join(map(str, shape)) for shape in trained.shapes.values())
        scale = trained.numbers.get("scale")
        words = f"{trained.rank}\t{scale}"
        rows.append((module, trained.method, shapes, touched.get(module, "-"), words))
        names.append(module)
        numbers.append((trained.rank, scale))
    replaced = {tensor.source.name: tensor.name for tensor in found.plan.tensors} if found.plan is not None else {}
    for name, info in adapter.saved.items():
        target = replaced.get(info.name, name)
        rows.append((name, "whole", "x".join(map(str, info.shape)), target if found.plan is not None else "-", ""))
        names.append(target)
        numbers.append((0, None))
    return tuple(
        Kind(
            *(group.cells[0], group.cells[1]),
            *numbers[group.members[0]],
            *(group.cells[2], group.cells[3]),
            tuple(names[place] for place in group.members),
            tuple(found.sizes[names[place]] for place in group.members if names[place] in found.sizes),
        )
        for group in grouped(rows)
    )


def _size_record(size: Size | None) -> dict[str, float | None] | None:
    if size is None:
        return None
    update = None if size.update is None else _finite(size.update)
    return {"update": update, "weight": size.weight, "ratio": size.ratio, "share_read": size.share}


def dtypes(adapter: Adapter) -> dict[str, int]:
    """Number of trained tensors by dtype."""
    tensors = (info for trained in adapter.trained.values() for info in trained.tensors.values())
    return dict(Counter(TORCH_NAME.get(info.dtype, info.dtype) for info in tensors))


def _norm(adapter: Adapter, module: str) -> float:
    import numpy as np

    with np.errstate(all="ignore"):  # damage, of which the norm tells
        wide = [array.astype(np.float64) for array in adapter.arrays(module).values() if array.dtype.kind != "i"]
        return float(np.sqrt(sum((values * values).sum() for values in wide)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN
