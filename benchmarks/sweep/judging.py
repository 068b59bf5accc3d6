"""The live trained model against a loaded result: every value, and the answers, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sweep import inputs

CLOSE = 1e-6  # of a trained weight in float32: some roundings, of the sum and of what is added
ANSWERS = {torch.float64: 1e-4, torch.float32: 3e-3}  # of the largest answer, by what it was computed in

ANSWERS_DIFFER = "the values are right, the answers are off"


@dataclass(frozen=True)
class Truth:
    """What the trainer has: `values` float64 by plain name, `trained` the names of those that are not the base's,
    and the answers to `question`, with `sensible` whether they tell the trained model from the base."""

    values: Mapping[str, torch.Tensor]
    trained: frozenset[str]
    question: Question | None
    answers: list[torch.Tensor]
    sensible: bool


@dataclass(frozen=True)
class Question:
    """Inputs, what to compute in, and what the base answers."""

    inputs: inputs.Inputs
    dtype: torch.dtype
    answers: list[torch.Tensor]

    def ask(self, model: Any) -> list[torch.Tensor]:
        """`model` computes in `dtype` from then on."""
        return inputs.outputs(inputs.computing(model, self.dtype), self.inputs)


def question(base: Any) -> Question | None:
    """Float64, or float32 where a model knows no other; None where no inputs can be made."""
    for dtype in (torch.float64, torch.float32):
        model = inputs.computing(copy.deepcopy(base), dtype)
        asked = inputs.find(model)
        if asked is not None:
            return Question(asked, dtype, inputs.outputs(model, asked))
    return None


def truth(live: Any, base_values: Mapping[str, torch.Tensor], asked: Question | None) -> Truth:
    """Of a PEFT model, which stays as it is."""
    copied = copy.deepcopy(live)
    single = None if asked is None or asked.dtype == torch.float64 else asked.ask(copied.base_model.model)
    values = effective(copied.double())
    trained = frozenset(
        name for name, value in values.items() if name not in base_values or not torch.equal(value, base_values[name])
    )
    if asked is None:
        return Truth(values, trained, None, [], False)
    answers = asked.ask(copied.base_model.model) if single is None else single
    sensible = _far(answers, asked.answers) > 10 * ANSWERS[asked.dtype]
    return Truth(values, trained, asked, answers, sensible)


def effective(live: Any) -> dict[str, torch.Tensor]:
    """What each parameter and buffer of the plain model must be, by its plain name, in the dtype of `live`."""
    plain = live.base_model.model
    found: dict[str, torch.Tensor] = {}
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, value in plain.state_dict(keep_vars=True).items():
        beside = any(name.startswith(f"{layer}.") and not name.startswith(f"{layer}.base_layer.") for layer in layers)
        if ".original_module." not in name and not beside:
            found[_plain_name(name)] = value.detach()
    for name, module in layers.items():
        if ".original_module." not in name:
            alone = copy.deepcopy(module)  # a tied weight stays as it is
            with torch.no_grad():
                alone.merge(adapter_names=["default"])
            one = getattr(alone, "parameter_name", None)  # of several around one module
            for own, parameter in alone.get_base_layer().named_parameters(recurse=False):
                if one in (None, own):
                    found[_plain_name(f"{name}.{own}")] = parameter.detach()
    return found


def _plain_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", name.replace(".modules_to_save.default.", "."))


def difference(model: Any, wanted: Truth) -> str | None:
    """The first value of a loaded result (float32) that is not the trainer's, in words; None if there is none."""
    ours = model.state_dict(keep_vars=True)
    for name in sorted(wanted.values, key=lambda name: name not in wanted.trained):  # the trained ones first
        value = wanted.values[name]
        if name not in ours:
            return f"{name} is not there"
        got = ours[name].detach()
        if got.shape != value.shape:
            return f"{name} is {list(got.shape)}, not {list(value.shape)}"
        if not value.is_floating_point():
            if not torch.equal(got, value):
                return f"{name} is changed"
            continue
        if name not in wanted.trained:
            if not torch.equal(got.double(), value):
                return f"{name} was not trained and is changed, by {_relative(got, value):.1e}"
        elif bool(((got.double() - value).abs() > CLOSE * (1 + value.abs())).any()):
            return f"{name} is off by {_relative(got, value):.1e}"
    more = [name for name in ours if name not in wanted.values]
    return f"{more[0]} is new" if more else None


def answers_differ(model: Any, wanted: Truth) -> str | None:
    """The same for the answers. `model` is used up."""
    if wanted.question is None:
        return None
    far = _far(wanted.question.ask(model), wanted.answers)
    return f"{ANSWERS_DIFFER} by {far:.1e}" if far > ANSWERS[wanted.question.dtype] else None


def unused(base: Any, wanted: Truth) -> bool:
    """Whether the trainer itself does not compute with the values it trained: a base with them answers otherwise."""
    if wanted.question is None:
        return False
    model = copy.deepcopy(base)
    known = dict(model.named_parameters(remove_duplicate=False))
    for name in known.keys() & wanted.values.keys():
        home, _, last = name.rpartition(".")
        value = torch.nn.Parameter(wanted.values[name].to(known[name].dtype), requires_grad=False)
        setattr(model.get_submodule(home), last, value)  # ties are cut
    return _far(wanted.question.ask(model), wanted.answers) > ANSWERS[wanted.question.dtype]


def _far(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            top = float(other.abs().nan_to_num(0, 0, 0).max()) or 1.0
            off = (one.double() - other.double()).abs()
            worst = max(worst, float(off.nan_to_num(0.0, float("inf")).max()) / top)
    return worst


def _relative(got: torch.Tensor, value: torch.Tensor) -> float:
    return float((got.double() - value).norm() / (value.norm() + 1e-30))
