"""The unmerged forward pass, for adapters that today's PEFT cannot load (Bone), or not run right (`_trainer`).

    y = W x + up · down(x)       for a method that has such a form (methods/_low_rank.py)
    y = (W + ΔW) x               for the others

Of several each adds its branch, or changes the weight that the ones before it gave; a weight w takes w times it.

Source: MissLinear.forward in peft/tuners/miss/layer.py, against which it is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fossil_export import models
from fossil_export.adapters import Trained
from fossil_export.errors import MergeError, listed
from fossil_export.methods import METHODS, starts_elsewhere
from fossil_export.models import Names
from fossil_export.verifying._sum import Sum

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class TrainedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy here
    """A Linear or Conv1D with what was trained beside it; computes in the dtype of that and returns the input's."""

    def __init__(
        self,
        base_layer: nn.Module,
        *added: tuple[Mapping[str, torch.Tensor], Trained, float],
        brought: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trained = nn.ModuleList(
            nn.ParameterDict({role: nn.Parameter(array, False) for role, array in arrays.items()})
            for arrays, _, _ in added
        )
        of_weight = {"dtype": _STORED.get(base_layer.weight.dtype), "brought": brought}
        self._added = [
            (METHODS[trained.method], {**trained.numbers, **of_weight}, weight) for _, trained, weight in added
        ]
        # What a decomposition made is dear, and kept.
        self._keeps = any(starts_elsewhere(trained.method) for _, trained, _ in added)
        self._made: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.base_layer
        wide = next(array.dtype for array in self.trained.parameters() if array.is_floating_point())
        # transformers' Conv1D has its weight the other way round.
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        parts = [
            (method, dict(arrays), numbers, times)
            for arrays, (method, numbers, times) in zip(self.trained, self._added, strict=True)
        ]
        found = [method.low_rank(arrays, numbers, weight.shape[0]) for method, arrays, numbers, _ in parts]
        forms = [form for form in found if form is not None]
        result: torch.Tensor
        if len(forms) == len(parts):
            result = layer(x)
            for form, (*_, times) in zip(forms, parts, strict=True):
                branch = form.branch(x.to(wide))
                result = result + (branch if times == 1 else branch * times)
            return result.to(x.dtype)
        changed = weight.to(wide)
        bias = None if layer.bias is None else layer.bias.to(wide)
        changed = self._made if self._made is not None else self._changed(changed, parts)
        result = nn.functional.linear(x.to(wide), changed, bias)
        return result.to(x.dtype)

    def _changed(self, weight: torch.Tensor, parts: Any) -> torch.Tensor:
        """The weight with all that was trained."""
        for method, arrays, numbers, times in parts:
            update = method.update(weight, arrays, numbers, 0)
            weight = weight + (update if times == 1 else update * times)
        self._made = weight if self._keeps else None
        return weight


def attach(model: nn.Module, added: Sum, dtype: torch.dtype, remedy: str | None = None) -> nn.Module:
    """Put what the adapters trained (as `dtype`) and their saved tensors into `model`, in place.

    Raises MergeError when a module is not found, or is no Linear or Conv1D, which PEFT might run after the `remedy`.
    """
    modules = dict(model.named_modules())
    trained: dict[str, list[tuple[Any, Trained, float]]] = {}
    brought: set[str] = set()
    for adapter, weight in added:
        wanted = dict.fromkeys([*adapter.trained, *(name.rpartition(".")[0] for name in adapter.saved)])
        names = _module_names(wanted, model, modules)
        missing = [module for module in wanted if module not in names]
        if missing:
            raise MergeError(
                f"{adapter.path}: the model {type(model).__name__} has no {listed(missing)}; name its base with --base"
            )
        for name, info in adapter.saved.items():
            module, _, parameter = name.rpartition(".")
            place = getattr(modules[names[module]], parameter)
            # A tied parameter that was trained on its own becomes one of its own.
            own = nn.Parameter(_tensor(adapter.array(info)).to(place), requires_grad=False)
            setattr(modules[names[module]], parameter, own)
            brought.add(f"{names[module]}.{parameter}")
        for module, one in adapter.trained.items():
            layer = modules[names[module]]
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise MergeError(
                    f"{adapter.path}: trained {module}, a {type(layer).__name__}, with {one.method}, which cannot be "
                    f"run {'' if remedy else 'beside the other adapters '}here; --level weights checks the merge"
                    + (f"; {remedy}" if remedy else "")
                )
            device = layer.weight.device
            found = {role: _tensor(array).to(device) for role, array in adapter.arrays(module).items()}
            arrays = {
                role: array.to(dtype) if array.is_floating_point() else array.long() for role, array in found.items()
            }
            trained.setdefault(names[module], []).append((arrays, one, weight))
    for name, parts in trained.items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, TrainedLinear(modules[name], *parts, brought=f"{name}.weight" in brought))
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
