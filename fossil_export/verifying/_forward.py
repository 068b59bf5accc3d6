"""Forward level: is the artifact any further from the truth than the trainer itself?

The truth is the trained model, unmerged, run in float64 (float32 for large models and on a GPU); the
trainer is the same model in the dtype it trained in. Rounding moves both; a fault moves the artifact alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import begin, counted
from fossil_export._threads import bounded_torch
from fossil_export.verifying._models import Runner, Tokens, tokenize
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._trainer import open_trainer

if TYPE_CHECKING:
    import torch

FACTOR = 2.0
"""The artifact's error may be this many times the trainer's, in the median position and in the worst tenth.
Both are rounding noise of the same size; measured ratios are in docs/parity.md."""

FLOOR = 2e-5
"""Relative error that float32 arithmetic alone explains, allowed even where the trainer has less."""

MODULE_FACTOR = 4.0
"""For single modules, whose errors scatter more than the whole model's."""

CONTINUED, NEW_TOKENS = 4, 12
"""Prompts that are continued greedily, and by how many tokens."""

WIDE_LIMIT = 1_000_000_000
"""Parameters up to which the truth is run in float64 on a CPU."""

ALONE = 200_000_000
"""Parameters up to which one thread runs a model: two are no faster, and take turns with all that runs beside them."""


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


@dataclass(frozen=True)
class ForwardCheck:
    """`first_outside` is the module, in the order they run, where the artifact first leaves the band; looked
    for only when `problem` says that the logits do. `same_continuations` counts, of `continuations`. `noise` is
    the relative error that the artifact's runtime explains beside rounding (`Subject`)."""

    prompts: int
    truth_dtype: str
    trainer_dtype: str
    device: str
    trainer: Distance
    artifact: Distance
    same_continuations: int
    continuations: int
    modules: tuple[ModuleError, ...]
    first_outside: str | None
    problem: str | None
    noise: float = 0.0


@dataclass(frozen=True)
class Subject:
    """What is held against the trainer: how to open it, and what is known of it beforehand.

    `described_by` is the folder whose config names the model's class; `noise` is the relative error that its
    runtime's arithmetic explains beside rounding; `change` and `merged` are `open_trainer`'s, for artifacts that
    store other weights than the trainer's on purpose (quantized ones). What `change` finds wrong is in `problems`.
    """

    described_by: Path
    open: Callable[[], Runner]
    noise: float = 0.0
    change: Callable[[Any], None] | None = None
    merged: bool = False
    problems: list[str] = field(default_factory=list)


def check_forward(
    subject: Subject,
    base: Path,
    added: Sum,
    dtype: str,
    parameters: int,
    prompts: tuple[str, ...],
    device: str,
) -> ForwardCheck:
    """Run truth, trainer (in `dtype`) and artifact on `prompts`, one model in memory at a time."""
    with bounded_torch(1 if parameters <= ALONE else None):
        return _checked(subject, base, added, dtype, parameters, prompts, device)


def _checked(
    subject: Subject,
    base: Path,
    added: Sum,
    dtype: str,
    parameters: int,
    prompts: tuple[str, ...],
    device: str,
) -> ForwardCheck:
    begin("opening the model")
    tokens = tokenize(subject.described_by, prompts)
    truth_dtype = "float64" if parameters <= WIDE_LIMIT and not device.startswith("cuda") else "float32"
    model = (added, base, subject.described_by)
    runner: Runner = open_trainer(*model, truth_dtype, device, subject.change, subject.merged)
    truth = [
        runner.logits(ids) for ids in counted(tokens, f"the trained model in {truth_dtype}", len(tokens), "prompts")
    ]
    true_modules = runner.modules(tokens[0]) or {}
    runner.close()

    begin("opening the model again")
    runner = open_trainer(*model, dtype, device, subject.change, subject.merged)
    trainer, trainer_modules, trained = _run(runner, tokens, truth, true_modules, f"the trained model in {dtype}")
    begin("opening the artifact")
    runner = subject.open()
    found, artifact_modules, continued = _run(runner, tokens, truth, true_modules, "the artifact")

    modules = tuple(
        ModuleError(name, trainer_modules[name], artifact_modules[name], subject.noise)
        for name in true_modules
        if name in trainer_modules and name in artifact_modules
    )
    problem, first = _judge(trainer, found, modules, subject.noise)
    # A graph of a masked model has logits, too, but its trainer does not generate.
    pairs = list(zip(trained, continued, strict=True)) if trained and continued else []
    return ForwardCheck(
        prompts=len(prompts),
        truth_dtype=truth_dtype,
        trainer_dtype=dtype,
        device=device,
        trainer=trainer,
        artifact=found,
        same_continuations=sum(one == other for one, other in pairs),
        continuations=len(pairs),
        modules=modules,
        first_outside=first,
        problem=problem,
        noise=subject.noise,
    )


def _judge(
    trainer: Distance, found: Distance, modules: tuple[ModuleError, ...], noise: float
) -> tuple[str | None, str | None]:
    """What is wrong, in words, and the module where it begins."""
    for what, theirs, ours, own in (
        ("the median position", trainer.relative_error, found.relative_error, noise),
        ("a tenth of the positions", trainer.worst_tenth, found.worst_tenth, 2 * noise),
    ):
        allowed = FACTOR * theirs + FLOOR + own
        if not ours <= allowed:
            first = next((error.module for error in modules if error.outside), None)
            where = f", first at module {first}" if first else ""
            problem = (
                f"the logits of {what} are {ours:.2g} from the truth, the trainer's {theirs:.2g} "
                f"(up to {allowed:.2g} is rounding){where}"
            )
            return problem, first
    return None, None


def _run(
    runner: Runner,
    tokens: list[Tokens],
    truth: list[torch.Tensor],
    true_modules: dict[str, torch.Tensor],
    name: str,
) -> tuple[Distance, dict[str, float], list[Tokens]]:
    """Distance, error by module and continuations of one model, which is closed afterwards."""
    try:
        asked = counted(tokens, name, len(tokens), "prompts")
        found = distance([runner.logits(ids) for ids in asked], truth)
        outputs = runner.modules(tokens[0]) or {}
        errors = {
            name: _relative(outputs[name], want)
            for name, want in true_modules.items()
            if name in outputs and outputs[name].shape == want.shape
        }
        some = counted(tokens[:CONTINUED], f"{name}, continued", len(tokens[:CONTINUED]), "prompts")
        continued = [runner.generate(ids, NEW_TOKENS) for ids in some]
        return found, errors, [ids for ids in continued if ids is not None]
    finally:
        runner.close()


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


def _relative(found: torch.Tensor, want: torch.Tensor) -> float:
    size = float(want.norm())
    return _finite(float((found - want).norm()) / size) if size else 0.0


def _finite(value: float) -> float:
    """NaN means as far from the truth as can be."""
    return math.inf if math.isnan(value) else value
