"""How far logits are from the truth's, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FACTOR = 2.0
"""The artifact's error may be this many times the trainer's, in the median position and in the worst tenth.
Both are rounding noise of the same size; measured ratios are in docs/parity.md."""

FLOOR = 2e-5
"""Relative error that float32 arithmetic alone explains, allowed even where the trainer has less."""

MODULE_FACTOR = 4.0
"""For single modules, whose errors scatter more than the whole model's."""

FEW_FACTOR = 8.0
"""For prompts that are too few to be judged alone, against the worst tenth of the trainer's positions over all prompts.
Rounding took no single position further than 6.1 times that (docs/parity.md)."""


@dataclass(frozen=True)
class Distance:
    """How far a model's logits are from the truth's, over the positions of all prompts.

    The relative error of a position is |l - t| / |t|; `relative_error` is that of the median position,
    `worst_tenth` the 90th percentile (a single position can be anywhere in bfloat16: attention sinks).
    `kl` is the mean KL(truth ‖ model) in nats, `top1` the share of positions with the same likeliest token.
    """

    relative_error: float
    worst_tenth: float
    max_abs_difference: float
    kl: float
    top1: float


@dataclass(frozen=True)
class ModuleError:
    """Relative error of one module's output on the first prompt, for trainer and artifact."""

    module: str
    trainer: float
    artifact: float
    noise: float = 0.0

    @property
    def outside(self) -> bool:
        """Whether the artifact has left the band around the trainer."""
        return not self.artifact <= MODULE_FACTOR * self.trainer + FLOOR + self.noise


def judge(trainer: Distance, found: Distance, noise: float = 0.0) -> str | None:
    """What is wrong with logits of all prompts, in words; `noise` is what the artifact's runtime explains."""
    for what, theirs, ours, own in (
        ("the median position", trainer.relative_error, found.relative_error, noise),
        ("a tenth of the positions", trainer.worst_tenth, found.worst_tenth, 2 * noise),
    ):
        allowed = FACTOR * theirs + FLOOR + own
        if not ours <= allowed:
            explained = "what rounding and the runtime's 8-bit products explain" if noise else "rounding"
            return (
                f"the logits of {what} are {ours:.2g} from the truth, the trainer's {theirs:.2g} "
                f"(up to {allowed:.2g} is {explained})"
            )
    return None


def judge_few(whole: Distance, trainer: Distance, found: Distance) -> str | None:
    """What is wrong with logits of a few prompts, which scatter: only what no rounding does. `whole` is the trainer's
    distance over all prompts."""
    for what, theirs, ours in (
        ("the median position", trainer.relative_error, found.relative_error),
        ("a tenth of the positions", trainer.worst_tenth, found.worst_tenth),
    ):
        allowed = FEW_FACTOR * max(theirs, whole.worst_tenth) + FLOOR
        if not ours <= allowed:
            return (
                f"on the given prompts the logits of {what} are {ours:.2g} from the truth, the trainer's {theirs:.2g} "
                f"(up to {allowed:.2g} is rounding)"
            )
    return None


def judge_as_run(found: Distance) -> str | None:
    """What is wrong with a graph as its runtime computes it, if its products are right in full precision: only what
    makes its answers useless."""
    if found.relative_error < 1:
        return None
    return (
        f"its products are right, but as it runs, with products of 8 bits, its logits are {found.relative_error:.2g} "
        "from the truth; build the graph with accuracy level 1"
    )


def distance(logits: list[torch.Tensor], truth: list[torch.Tensor]) -> Distance:
    """Compare lists of logits (positions, vocabulary), one tensor a prompt."""
    import torch

    if any(one.shape != other.shape for one, other in zip(logits, truth, strict=True)):
        return Distance(math.inf, math.inf, math.inf, math.inf, 0.0)
    found, want = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (logits, truth))
    errors = (found - want).norm(dim=-1) / want.norm(dim=-1)
    p, q = torch.log_softmax(want, -1), torch.log_softmax(found, -1)
    median, tenth = (
        errors.nan_to_num(math.inf)
        .quantile(torch.tensor([0.5, 0.9], dtype=errors.dtype, device=errors.device))
        .tolist()
    )
    return Distance(
        relative_error=_finite(median),
        worst_tenth=_finite(tenth),
        max_abs_difference=_finite(float((found - want).abs().max())),
        kl=_finite(max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))),
        top1=float((found.argmax(-1) == want.argmax(-1)).double().mean()),
    )


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    size = float(want.norm())
    return _finite(float((found - want).norm()) / size) if size else 0.0


def _finite(value: float) -> float:
    """NaN means as far from the truth as can be."""
    return math.inf if math.isnan(value) else value
