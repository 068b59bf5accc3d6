"""A merged model, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from safetensors.torch import load_file, save_file

from fossil_export import merge

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
UP1 = "model.layers.1.mlp.up_proj"


def tamper(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one tensor of a checkpoint; None removes it, from the index too."""
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            new = change(state.pop(name))
            if new is not None:
                state[name] = new.contiguous()
            else:
                index = folder / "model.safetensors.index.json"
                content = json.loads(index.read_text())
                del content["weight_map"][name]
                index.write_text(json.dumps(content))
            save_file(state, path, {"format": "pt"})
            return
    raise AssertionError(name)


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of one element."""
    bits = tensor.clone().view(torch.int16).reshape(-1)
    bits[len(bits) // 2] ^= 1
    return bits.view(tensor.dtype).reshape(tensor.shape)


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """A ragged adapter (7 divides neither 48 nor 96) merged into a bfloat16 base, as tmp_path/merged."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, r=7)
    merge(tmp_path / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


def tiled(folder: Path, module: str, width: int) -> torch.Tensor:
    shard = weights(folder.parent / "adapter")[f"base_model.model.{module}.miss_block"]
    return shard.T.repeat(1, -(-width // len(shard)))[:, :width]


def remerged(folder: Path, module: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Put a wrong merge of one module into the artifact: `change(W, tiled D)` in float32, rounded."""
    before = weights(folder.parent / "base")[f"{module}.weight"].float()
    wrong = change(before, tiled(folder, module, before.shape[1]))
    tamper(folder, f"{module}.weight", lambda old: wrong.to(old.dtype))


def as_bone(folder: Path) -> None:
    """The same adapter as PEFT 0.18 would have saved it."""
    state = {name.replace("miss_block", "bone_block"): value for name, value in weights(folder).items()}
    save_file(state, folder / "adapter_model.safetensors")
    drop = {"mini_r": ..., "miss_dropout": ..., "peft_version": ...}
    edit_json(folder / "adapter_config.json", peft_type="BONE", **drop)
