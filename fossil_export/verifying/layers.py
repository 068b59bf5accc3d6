"""FOSSIL's unmerged forward pass, for adapters that today's PEFT cannot load (Bone).

    tile, mini:  y = W x + S(x) D,  S(x)[k] = sum of x[j] over j with j mod r == k
    bat:         y = (W + ΔW) x with ΔW as in methods/bat.py

Source: MissLinear.forward in peft/tuners/miss/layer.py, against which it is tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fossil_export.adapters import Adapter
from fossil_export.errors import MergeError, listed
from fossil_export.merging.match import match_names


class FossilLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy here
    """A Linear with its shard beside it; computes in the shard's dtype and returns the input's."""

    def __init__(self, base_layer: nn.Linear, shard: torch.Tensor, variant: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shard = nn.Parameter(shard, requires_grad=False)

        self._result = FORWARD[variant]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._result(self.base_layer, self.shard, x).to(x.dtype)


def _tile(layer: nn.Linear, shard: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rank = len(shard)
    padded = nn.functional.pad(x.to(shard.dtype), (0, -x.shape[-1] % rank))
    sums = padded.reshape(*x.shape[:-1], -1, rank).sum(dim=-2)
    result: torch.Tensor = layer(x) + sums @ shard
    return result


def _mini(layer: nn.Linear, shard: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _tile(layer, shard.repeat(1, layer.weight.shape[0] // shard.shape[1]), x)


def _bat(layer: nn.Linear, shard: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rank = shard.shape[1]
    wide = layer.weight.to(shard.dtype)
    blocks = wide.reshape(len(shard), rank, -1, rank)
    update = torch.einsum("biak,bkl->bial", blocks, shard) + shard[:, :, None, :]
    bias = None if layer.bias is None else layer.bias.to(shard.dtype)
    result: torch.Tensor = nn.functional.linear(x.to(shard.dtype), wide + update.reshape(wide.shape), bias)
    return result


FORWARD = {"tile": _tile, "mini": _mini, "bat": _bat}
"""The output of a layer with its shard, by variant; a variant that is not here cannot be run."""


def attach(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> nn.Module:
    """Put `adapter`'s shards (as `dtype`) and saved tensors into `model`, in place.

    Raises MergeError when a module is not found.
    """
    modules = dict(model.named_modules())
    trained = dict.fromkeys([*adapter.shards, *(name.rpartition(".")[0] for name in adapter.saved)])
    names = match_names(trained, modules)
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
    for module, shard in adapter.shards.items():
        parent, _, last = names[module].rpartition(".")
        layer = modules[names[module]]
        values = _tensor(adapter.array(shard.tensor)).to(layer.weight.device, dtype)
        setattr(modules[parent], last, FossilLinear(layer, values, shard.variant))
    return model


def _tensor(array: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(array.astype(np.float32))
