"""The unmerged forward pass, for adapters that today's PEFT cannot load (Bone), or not on such layers (Conv1D).

    y = W x + up · down(x)       for a method that has such a form (methods/_low_rank.py)
    y = (W + ΔW) x               for the others

Source: MissLinear.forward in peft/tuners/miss/layer.py, against which it is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fossil_export import models
from fossil_export.adapters import Adapter, Trained
from fossil_export.errors import MergeError, listed
from fossil_export.methods import METHODS, starts_elsewhere
from fossil_export.models import Names

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class TrainedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy here
    """A Linear or Conv1D with what was trained beside it; computes in the dtype of that and returns the input's."""

    def __init__(
        self, base_layer: nn.Module, arrays: Mapping[str, torch.Tensor], trained: Trained, brought: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trained = nn.ParameterDict({role: nn.Parameter(array, False) for role, array in arrays.items()})
        self._name, self._method = trained.method, METHODS[trained.method]
        self._made: torch.Tensor | None = None  # what a decomposition made, which is dear
        self._numbers = {
            **trained.numbers,
            "dtype": _STORED.get(base_layer.weight.dtype),
            "brought": brought,
            "transposed": not isinstance(base_layer, nn.Linear),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, arrays = self.base_layer, dict(self.trained)
        wide = next(array.dtype for array in arrays.values() if array.is_floating_point())
        # transformers' Conv1D has its weight the other way round.
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        form = self._method.low_rank(arrays, self._numbers, weight.shape[0])
        if form is not None:
            return (layer(x) + form.branch(x.to(wide))).to(x.dtype)
        weight = weight.to(wide)
        bias = None if layer.bias is None else layer.bias.to(wide)
        changed = self._made
        if changed is None:
            changed = weight + self._method.update(weight, arrays, self._numbers, 0)
            self._made = changed if starts_elsewhere(self._name) else None
        result: torch.Tensor = nn.functional.linear(x.to(wide), changed, bias)
        return result.to(x.dtype)


def attach(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> nn.Module:
    """Put what `adapter` trained (as `dtype`) and its saved tensors into `model`, in place.

    Raises MergeError when a module is not found.
    """
    modules = dict(model.named_modules())
    trained = dict.fromkeys([*adapter.trained, *(name.rpartition(".")[0] for name in adapter.saved)])
    names = _module_names(trained, model, modules)
    missing = [module for module in trained if module not in names]
    if missing:
        raise MergeError(
            f"{adapter.path}: the model {type(model).__name__} has no {listed(missing)}; name its base with --base"
        )
    for name, info in adapter.saved.items():
        module, _, parameter = name.rpartition(".")
        place = getattr(modules[names[module]], parameter)
        # A tied parameter that was trained on its own becomes one of its own.
        setattr(
            modules[names[module]], parameter, nn.Parameter(_tensor(adapter.array(info)).to(place), requires_grad=False)
        )
    for module, one in adapter.trained.items():
        parent, _, last = names[module].rpartition(".")
        layer = modules[names[module]]
        found = {role: _tensor(array).to(layer.weight.device) for role, array in adapter.arrays(module).items()}
        arrays = {role: array.to(dtype) if array.is_floating_point() else array.long() for role, array in found.items()}
        setattr(modules[parent], last, TrainedLinear(layer, arrays, one, f"{module}.weight" in adapter.saved))
    return model


def _module_names(trained: Iterable[str], model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The model's name of each module that it has; adapters of other transformers versions have other ones."""
    found = {module: module for module in trained if module in modules}
    config = getattr(model, "config", None)  # our own small models have none
    known = models.architecture(config.to_dict(), type(model).__name__) if config is not None else None
    names = Names(known, ()) if known is not None else None
    for module in trained:
        parameter = names.parameter(f"{module}.weight") if names is not None and module not in found else None
        if parameter is not None and parameter.rpartition(".")[0] in modules:
            found[module] = parameter.rpartition(".")[0]
    return found


def _tensor(array: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(array.astype(np.float32))
