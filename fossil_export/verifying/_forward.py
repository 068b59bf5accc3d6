"""Forward level: is the artifact any further from the truth than the trainer itself?

The truth is the trained model, unmerged, run in float64 (float32 for large models and on a GPU); the
trainer is the same model in the dtype it trained in. Rounding moves both; a fault moves the artifact alone. A graph
that its runtime computes with rounded products is judged with products of full precision, and measured as it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import begin, counted
from fossil_export._threads import bounded_torch
from fossil_export.verifying._bounds import Distance, ModuleError, distance, judge, judge_as_run, judge_few, relative
from fossil_export.verifying._models import Runner, Tokens, tokenize
from fossil_export.verifying._prompts import PROMPTS
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._trainer import open_trainer

if TYPE_CHECKING:
    import torch

CONTINUED, NEW_TOKENS = 4, 12
"""Prompts, of those that were given, that are continued greedily, and by how many tokens."""

WIDE_LIMIT = 1_000_000_000
"""Parameters up to which the truth is run in float64 on a CPU."""

NARROW = ("bfloat16", "float16")
"""Dtypes of a trainer with errors that scatter from one prompt to the next; in wider ones `FLOOR` is far above them."""

ALONE = 200_000_000
"""Parameters up to which one thread runs a model: two are no faster, and take turns with all that runs beside them."""


@dataclass(frozen=True)
class ForwardCheck:
    """`first_outside` is the module, in the order they run, where the artifact first leaves the band; looked
    for only when `problem` says that the logits do. `same_continuations` counts, of `continuations`. `noise` is
    the relative error that the artifact's runtime explains beside rounding (`Subject`). `as_run` is how far the
    artifact is as its runtime computes it, if `artifact` and the modules are of products in full precision. Of the
    `prompts` the last `added_prompts` are built-in ones, asked because the given ones were too few to judge by."""

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
    as_run: Distance | None = None
    added_prompts: int = 0

    @property
    def asked(self) -> str:
        """ "16 prompts", "2 prompts and 16 built-in ones"."""
        given = self.prompts - self.added_prompts
        more = f" and {self.added_prompts} built-in ones" if self.added_prompts else ""
        return f"{given} prompt{'' if given == 1 else 's'}{more}"


@dataclass(frozen=True)
class Subject:
    """What is held against the trainer: how to open it, and what is known of it beforehand.

    `described_by` is the folder whose config names the model's class; `noise` is the relative error that its
    runtime's arithmetic explains beside rounding; `change` and `merged` are `open_trainer`'s, for artifacts that
    store other weights than the trainer's on purpose (quantized ones). What `change` finds wrong is in `problems`.
    `exact`, called after it, opens the artifact with its products in full precision, to be judged without `noise`, and
    says whether that is how it runs anyway; None if it cannot be run so.
    """

    described_by: Path
    open: Callable[[], Runner]
    noise: float = 0.0
    change: Callable[[Any], None] | None = None
    merged: bool = False
    problems: list[str] = field(default_factory=list)
    exact: Callable[[], tuple[Runner, bool] | None] = lambda: None


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
    what = f"the trained model in {truth_dtype}"
    truth = [runner.logits(ids) for ids in counted(tokens, what, len(tokens), "prompts")]
    given = len(tokens)
    if prompts != PROMPTS and dtype in NARROW:
        more = tokenize(subject.described_by, PROMPTS)
        if _positions(truth) < (sum(map(len, more)) if truth[0].ndim > 1 else len(more)):
            tokens += more
            truth += [runner.logits(ids) for ids in counted(more, f"{what}, built-in prompts", len(more), "prompts")]
    asked = _Asked(tokens, truth, runner.modules(tokens[0]) or {}, given)
    runner.close()

    begin("opening the model again")
    runner = open_trainer(*model, dtype, device, subject.change, subject.merged)
    trainer = _run(runner, asked, f"the trained model in {dtype}")
    begin("opening the artifact")
    exact, is_as_run = subject.exact() or (None, True)
    noise = subject.noise if exact is None else 0.0
    as_run = None
    if is_as_run:
        found = _run(exact or subject.open(), asked, "the artifact")
    else:
        found = _run(exact or subject.open(), asked, "the artifact in full precision", continued=False)
        begin("opening the artifact again")
        again = _run(subject.open(), asked, "the artifact as it runs", modules=False)
        as_run, found = again.distance, replace(found, continued=again.continued)

    errors = tuple(
        ModuleError(name, trainer.errors[name], found.errors[name], noise)
        for name in asked.outputs
        if name in trainer.errors and name in found.errors
    )
    problem = judge(trainer.distance, found.distance, noise)
    if problem is None and trainer.few is not None and found.few is not None:
        problem = judge_few(trainer.distance, trainer.few, found.few)
    first = next((error.module for error in errors if error.outside), None) if problem else None
    problem = problem and problem + (f", first at module {first}" if first else "")
    if problem is None and as_run is not None:
        problem = judge_as_run(as_run)
    # A graph of a masked model has logits, too, but its trainer does not generate.
    pairs = [*zip(trainer.continued, found.continued, strict=True)] if trainer.continued and found.continued else []
    return ForwardCheck(
        prompts=len(tokens),
        truth_dtype=truth_dtype,
        trainer_dtype=dtype,
        device=device,
        trainer=trainer.distance,
        artifact=found.distance,
        same_continuations=sum(one == other for one, other in pairs),
        continuations=len(pairs),
        modules=errors,
        first_outside=first,
        problem=problem,
        noise=noise,
        as_run=as_run,
        added_prompts=len(tokens) - given,
    )


def _positions(logits: list[torch.Tensor]) -> int:
    return sum(len(one) if one.ndim > 1 else 1 for one in logits)


@dataclass(frozen=True)
class _Asked:
    """All prompts, of which the first `given` are the user's, with the truth's logits for each and its modules'
    outputs for the first."""

    tokens: list[Tokens]
    truth: list[torch.Tensor]
    outputs: dict[str, torch.Tensor]
    given: int


@dataclass(frozen=True)
class _Run:
    """One model: its distance from the truth, that for the prompts that were given if others were added, the error by
    module, and the continuations."""

    distance: Distance
    few: Distance | None
    errors: dict[str, float]
    continued: list[Tokens]


def _run(runner: Runner, asked: _Asked, name: str, modules: bool = True, continued: bool = True) -> _Run:
    """What one model answers; it is closed afterwards."""
    tokens, given = asked.tokens, asked.given
    try:
        logits = [runner.logits(ids) for ids in counted(tokens, name, len(tokens), "prompts")]
        outputs = (runner.modules(tokens[0]) or {}) if modules else {}
        errors = {
            name: relative(outputs[name], want)
            for name, want in asked.outputs.items()
            if name in outputs and outputs[name].shape == want.shape
        }
        some = tokens[: min(given, CONTINUED)] if continued else []
        steps = counted(some, f"{name}, continued", len(some), "prompts") if some else ()
        answers = [runner.generate(ids, NEW_TOKENS) for ids in steps]
        return _Run(
            distance(logits, asked.truth),
            distance(logits[:given], asked.truth[:given]) if given < len(tokens) else None,
            errors,
            [ids for ids in answers if ids is not None],
        )
    finally:
        runner.close()
