"""(IA)³: a factor for each output, or for each input of a feed-forward module.

    W'[o, j] = W[o, j] · l[o],  b'[o] = b[o] · l[o]        of `feedforward_modules` W'[o, j] = W[o, j] · l[j], b' = b

l is stored as (out, 1) or (1, in), and for convolutions as (1, out, 1, …). Those of feed-forward convolutions are
refused: how many inputs a group of channels has, no matrix tells. Source: arXiv 2205.05638, section 3.3; `merge` in
peft/tuners/ia3/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export._patterns import PatternError, pattern_of
from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import SWITCH
from fossil_export.methods._method import Arrays, Combination, Field, Numbers, Shapes


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return value is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))


class Ia3(Base):
    PEFT: Mapping[str, Mapping[str, str]] = {"IA3": {"ia3_l": "l"}}
    COMBINES: Combination = "order"
    FIELDS = {
        "feedforward_modules": Field("a list of names, or a regular expression", _are_names),
        "fan_in_fan_out": SWITCH,
        "init_ia3_weights": Field(),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        shape = shapes["l"]
        inputs = _is_feedforward(config.get("feedforward_modules"), module, where)
        flat = len(shape) > 2 and shape[0] == 1 and all(size == 1 for size in shape[2:])
        if not flat and (len(shape) != 2 or 1 not in shape):
            raise AdapterError(f"{where} is no vector of factors; save the adapter again")
        if inputs is None and (flat or shape == (1, 1)):
            raise AdapterError(f"{where}: the config does not say what feedforward_modules are; mend the config")
        if flat and inputs:
            raise AdapterError(
                f"{where} has factors for the inputs of a convolution, which cannot be merged here; use PEFT's merge"
            )
        if inputs is None:
            inputs = shape[0] == 1
        if not flat and shape[0 if inputs else 1] != 1:
            raise AdapterError(
                f"{where} is for {'outputs' if inputs else 'inputs'}, but the config's feedforward_modules say "
                f"{'inputs' if inputs else 'outputs'}; mend the config"
            )
        return {"inputs": inputs}

    def dimensions(self, shapes: Shapes) -> int | None:
        return len(shapes["l"])

    def beside(self, numbers: Numbers) -> str | None:
        return None if numbers["inputs"] else "ia3_bias"

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found, kind, wanted = max(shapes["l"]), "outputs", weight[0]
        if numbers["inputs"]:
            kind, wanted = "inputs", weight[1]
        return f"it is made for {found} {kind}, the weight has {wanted}" if found != wanted else None

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        factors = arrays["l"]
        if len(factors.shape) > 2:
            return {"l": factors[:].reshape(-1, 1)[start:stop]}
        return {"l": factors[start:stop] if factors.shape[1] == 1 and len(factors) > 1 else factors[:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return weight * _factors(arrays["l"], start, len(weight)) - weight

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight *= _factors(arrays["l"], start, len(weight))


class Ia3Bias(Ia3):
    """The bias of a module whose outputs have factors."""

    PEFT: Mapping[str, Mapping[str, str]] = {}
    PARAMETER = "bias"

    def dimensions(self, shapes: Shapes) -> int | None:
        return 1

    def beside(self, numbers: Numbers) -> str | None:
        return None


def _factors(factors: Any, start: int, count: int) -> Any:
    if len(factors.shape) > 2:
        factors = factors.reshape(-1, 1)
    return factors[start : start + count] if factors.shape[1] == 1 and len(factors) > 1 else factors


def _is_feedforward(names: Any, module: str, where: str) -> bool | None:
    """Whether the config has a module among the feed-forward ones; None if it does not say.

    Source: `_check_target_module_feedforward` in peft/tuners/ia3/model.py.
    """
    if names is None:
        return None
    if not isinstance(names, str):
        return any(module.endswith(name) for name in names)
    try:
        return pattern_of(names).fullmatch(module) is not None
    except PatternError as problem:
        raise AdapterError(f"{where}: feedforward_modules {problem}") from problem
