"""What quantizing the base took from its weights, beside what training changed in them.

    q = ‖W − dequantized(quantized(W))‖        beside        ‖ΔW‖

By kind of module (q_proj, …), over sampled rows (`_sizes`). If q is many times ‖ΔW‖, the base that training saw and the
original differ by far more than all that was trained: into the original the updates make another model, and into the
trained one they bring the quantization's error along. Scales count as they are before a double quantization of theirs,
which moves q by less than a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fossil_export.merging._plan import MergePlan
from fossil_export.merging._sizes import Size, sizes_of

LIMIT = 1 << 19
"""Bytes of a weight that are read for a merge, which has other things to do."""

WARNING_ABOVE = {"trained": 10.0, "original": 1.0}
"""q / ‖ΔW‖ of a kind, by what the updates are added to, above which the user is warned.

Into the original, 1: from there on the base was moved further than training moved it. Measured on SmolLM2-135M, at 1.75
every second of the first-choice tokens was another one than in the trained model. Into the trained base the merged
model is the trained one whatever q is (measured up to 9.5); but peers found models of 10 and more useless beside their
original, since what quantization broke is in them.
"""


@dataclass(frozen=True)
class Ratio:
    """Of all modules of a kind together: q and ‖ΔW‖ as the roots of summed squares."""

    modules: int
    quantization: float
    update: float

    @property
    def ratio(self) -> float | None:
        return self.quantization / self.update if self.update else None

    def to_dict(self) -> dict[str, Any]:
        """As records have it, with as many digits as other processors get, too."""
        ratio = self.ratio
        return {
            "modules": self.modules,
            "quantization": _short(self.quantization),
            "update": _short(self.update),
            "ratio": None if ratio is None else _short(ratio),
        }


def ratios_of(plan: MergePlan) -> dict[str, Ratio]:
    """By kind of module, the last part of its name; none if training saw the base as it is stored, or if the original
    weights are not at hand."""
    return by_kind(sizes_of(plan, LIMIT, far=True)) if plan.seen.tensors else {}


def by_kind(sizes: Mapping[str, Size]) -> dict[str, Ratio]:
    found: dict[str, list[Size]] = {}
    for module, size in sizes.items():
        if size.quantization is not None and size.update is not None:
            found.setdefault(module.rpartition(".")[2], []).append(size)
    return {
        kind: Ratio(
            len(own),
            math.hypot(*(size.quantization or 0.0 for size in own)),
            math.hypot(*(size.update or 0.0 for size in own)),
        )
        for kind, own in found.items()
    }


def ratio_warnings(plan: MergePlan, found: Mapping[str, Ratio]) -> list[str]:
    limit = WARNING_ABOVE[plan.into]
    large = {kind: one.ratio for kind, one in found.items() if one.ratio is not None and one.ratio > limit}
    if not large or plan.trained_on is None:
        return []
    worst = max(large, key=lambda kind: large[kind] or 0.0)
    what = f"{plan.trained_on.kind} moved {worst} by {large[worst]:.3g} times what training changed"
    others = f" ({len(large)} of {len(found)} kinds of modules by more than {limit:g} times)"
    if plan.into == "original":
        return [f"{what}{others}, and these are the original weights; --into trained has those that training saw"]
    return [
        f"{what}{others}: the merged model is the trained one, and has the error of its quantized base; compare it "
        "with a merge --into original"
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
