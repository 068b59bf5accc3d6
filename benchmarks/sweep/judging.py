"""The live trained model against a loaded result: every value, and the answers, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sweep import inputs

CLOSE = 1e-6  # of a trained weight in float32: some roundings, of the sum and of what is added
ANSWERS = 1e-4  # of the largest answer

ANSWERS_DIFFER = "the values are right, the answers are off"


@dataclass(frozen=True)
class Truth:
    """What the trainer has: `values` float64 by plain name, `trained` the names of those that are not the base's,
    and the answers to `asked`, with `sensible` whether they tell the trained model from the base."""

    live: Any
    values: Mapping[str, torch.Tensor]
    trained: frozenset[str]
    asked: inputs.Inputs | None
    answers: list[torch.Tensor]
    sensible: bool


def truth(live: Any, base_values: Mapping[str, torch.Tensor], asked: inputs.Inputs | None,
          base_answers: list[torch.Tensor]) -> Truth:  # fmt: skip
    """Of a PEFT model, which stays as it is."""
    double = copy.deepcopy(live).double().eval()
    values = effective(double)
    trained = frozenset(
        name for name, value in values.items() if name not in base_values or not torch.equal(value, base_values[name])
    )
    answers: list[torch.Tensor] = []
    if asked is not None:
        try:
            answers = inputs.outputs(double.base_model.model, asked)
        except Exception:
            asked = None
    sensible = asked is not None and _far(answers, base_answers) > 10 * ANSWERS
    return Truth(double, values, trained, asked, answers, sensible)


def effective(live: Any) -> dict[str, torch.Tensor]:
    """What each parameter and buffer of the plain model must be, by its plain name, in the dtype of `live`."""
    plain = live.base_model.model
    found: dict[str, torch.Tensor] = {}
    for name, value in plain.state_dict(keep_vars=True).items():
        if ".original_module." in name or ".miss_block." in name:
            continue
        found[name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = value.detach()
    for name, module in plain.named_modules():
        if "default" in getattr(module, "miss_block", {}):
            home = name.replace(".modules_to_save.default", "")
            weight = module.get_base_layer().weight.detach().clone()
            with torch.no_grad():
                found[f"{home}.weight"] = module.get_delta_weight_miss("default", weight).detach()
    return found


def difference(model: Any, wanted: Truth) -> str | None:
    """The first value of a loaded result (float32) that is not the trainer's, in words; None if there is none."""
    ours = model.state_dict(keep_vars=True)
    for name in [*(n for n in wanted.values if n in wanted.trained), *(n for n in wanted.values if n not in wanted.trained)]:  # fmt: skip
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
    """The same for the answers. `model` becomes float64."""
    if wanted.asked is None:
        return None
    far = _far(inputs.outputs(model.double().eval(), wanted.asked), wanted.answers)
    return f"{ANSWERS_DIFFER} by {far:.1e}" if far > ANSWERS else None


def unused(base: Any, wanted: Truth) -> bool:
    """Whether the trainer itself does not compute with the values it trained: a base with them answers otherwise."""
    if wanted.asked is None:
        return False
    model = copy.deepcopy(base).double().eval()
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, value in wanted.values.items():
        if name in parameters and isinstance(parameters[name], torch.nn.Parameter):
            home, _, last = name.rpartition(".")
            setattr(model.get_submodule(home), last, torch.nn.Parameter(value, requires_grad=False))  # ties are cut
    return _far(inputs.outputs(model, wanted.asked), wanted.answers) > ANSWERS


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
