"""Bases of which tensors hold several weights, and adapters whose modules are told where theirs lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig
from peft.tuners.miss.layer import MissLinear
from safetensors.torch import load_file, save_file

from fossil_export import Adapter
from fossil_export.checkpoints import TensorInfo
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints.layouts import Matrix, Order, fused_rows, transposed_slice
from fossil_export.merging._change import Piece
from fossil_export.merging._placement import Placement


@dataclass(frozen=True)
class Spot:
    """Rows of a stored tensor, or matrix `number` of one (n, in, out), that a weight or a bias of the adapter is."""

    tensor: str
    first: int = 0
    count: int = 0
    order: Order | None = None
    number: int | None = None

    def matrix(self, base: Checkpoint) -> Matrix:
        info = base.tensors[self.tensor]
        if self.number is not None:
            return transposed_slice(info, self.number)
        return fused_rows(info, self.first, self.count, self.order)

    def piece(self, base: Checkpoint, values: TensorInfo) -> Piece:
        shape = base.tensors[self.tensor].shape
        return Piece(self.first * (shape[-1] if len(shape) > 1 else 1), values, self.order)


def put(
    patch: pytest.MonkeyPatch, spots: Mapping[str, Spot], change: Any = lambda placement, base, adapter: None
) -> None:
    """Let merge and verify place every weight and bias by these, and `change` what comes of it."""

    def place(adapter: Adapter, base: Checkpoint, tied: bool | None = None, *, into_floats: bool = True) -> Placement:
        found = Placement()
        for module, trained in adapter.trained.items():
            name = f"{module}.weight"
            found.trained[name], found.into[name] = trained, spots[name].matrix(base)
        for name, values in adapter.saved.items():
            if name in spots:
                tensor = spots[name].tensor
                found.pieces[tensor] = (*found.pieces.get(tensor, ()), spots[name].piece(base, values))
        change(found, base, adapter)
        return found

    patch.setattr("fossil_export.merging._planning.place", place)
    patch.setattr("fossil_export.verifying._weights.place", place)


def in_slabs(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Cut the work of merge and verify into small pieces."""
    for name in ("merging._slabs.SLAB", "verifying._job.SLAB", "verifying._job.BLOCK"):
        patch.setattr(f"fossil_export.{name}", nbytes)


def make(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
    pickled: bool = False,
    **config: Any,
) -> Path:
    """A base of these tensors, and an adapter for it; returns the adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True, exist_ok=True)
    if stored:
        save_file(dict(stored), base / "model.safetensors", {"format": "pt"})
        # Transformers is asked about names that no class has: a class of one layer is built at once, of 32 it is not.
        (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    adapter.mkdir()
    tensors = {f"base_model.model.{name}": value.clone() for name, value in held.items()}
    if pickled:
        torch.save(tensors, adapter / "adapter_model.bin")
    else:
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (rank, *_) = {
        value.shape[-1] if value.dim() == 3 else len(value) for name, value in held.items() if "_block" in name
    }
    named = {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    text = {"peft_type": "MISS", "r": rank} | named | config
    (adapter / "adapter_config.json").write_text(json.dumps(text))
    return adapter


def peft_layer(variant: str, weight: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """The weight that PEFT merges `shard` into."""
    rank = shard.shape[1] if variant == "bat" else shard.shape[0]
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    mini = shard.shape[1] if variant == "mini" else 1
    config = MissConfig(r=rank, init_weights=True if variant == "tile" else variant, mini_r=mini)
    wrapped = MissLinear(layer, "default", config=config, r=rank)
    wrapped.miss_block["default"].data = shard.clone()
    wrapped.merge()
    merged: torch.Tensor = wrapped.get_base_layer().weight.data
    return merged


def exact(variant: str, weight: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """The same by the formula, in float64."""
    weight, shard = weight.double(), shard.double()
    outputs, inputs = weight.shape
    if variant == "bat":
        rank = shard.shape[1]
        blocks = weight.reshape(outputs // rank, rank, inputs // rank, rank).transpose(1, 2)
        update = blocks @ shard[:, None] + shard[:, None]
        return weight + update.transpose(1, 2).reshape(weight.shape)
    rows = torch.arange(outputs) % shard.shape[1]
    return weight + shard[torch.arange(inputs) % shard.shape[0]][:, rows].T


def flipped(folder: Path, name: str, element: int) -> None:
    """Change one stored value."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    value = tensors[name].view(-1)[element]
    tensors[name].view(-1)[element] = value + 1 + value.abs()
    save_file(tensors, file, {"format": "pt"})
