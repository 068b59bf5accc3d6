"""Ways to damage an adapter or a base, each in one place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from same.inputs import CONFIG, PICKLED, PREFIX, WEIGHTS, Adapter, Array, Base, edit_json, write_tensors

QPROJ = f"{PREFIX}model.layers.0.self_attn.q_proj.miss_block"
INDEX = "model.safetensors.index.json"


def _config(**changes: Any) -> Callable[[Adapter], object]:
    return lambda adapter: edit_json(adapter.path / CONFIG, **changes)


def _tensors(**changes: Any) -> Callable[[Adapter], object]:
    """Tensors put in by full name."""
    return lambda adapter: write_tensors(adapter.path / WEIGHTS, {**adapter.tensors, **changes})


def _shard(value: Array) -> Callable[[Adapter], object]:
    return _tensors(**{QPROJ: value})


def _renamed(name: str) -> Callable[[Adapter], object]:
    def change(adapter: Adapter) -> None:
        tensors = {name if key == QPROJ else key: value for key, value in adapter.tensors.items()}
        write_tensors(adapter.path / WEIGHTS, tensors)

    return change


def _full(value: float, *shape: int) -> Array:
    return np.full(shape, value, np.float32)


ADAPTERS: dict[str, Callable[[Adapter], object]] = {
    "no config": lambda a: (a.path / CONFIG).unlink(),
    "config not JSON": lambda a: (a.path / CONFIG).write_text("{r: 8"),
    "config a list": lambda a: (a.path / CONFIG).write_text("[]"),
    "another method": _config(peft_type="LORA"),
    "rank no number": _config(r="8"),
    "unknown init_weights": _config(init_weights="odd"),
    "unknown field": _config(use_dora=True),
    "rank denied": _config(r=4),
    "mini denied": _config(init_weights="mini", mini_r=5),
    "bat denied": _config(init_weights="bat"),
    "target denied": _config(target_modules=["v_proj"]),
    "target pattern denied": _config(target_modules=".*v_proj"),
    "target pattern broken": _config(target_modules="("),
    "no base": _config(base_model_name_or_path=None),
    "base elsewhere": _config(base_model_name_or_path="some/where"),
    "odd modules_to_save": _config(modules_to_save=True),
    "shard of 3 dimensions": _shard(_full(0, 6, 8, 8)),
    "shard of 1 dimension": _shard(_full(0, 8)),
    "empty shard": _shard(_full(0, 0, 48)),
    "shard of int64": _shard(np.zeros((8, 48), np.int64)),
    "shard of another shape": _shard(_full(0, 8, 64)),
    "NaN": _shard(_full(float("nan"), 8, 48)),
    "infinity": _shard(_full(float("inf"), 8, 48)),
    "large": _shard(_full(3e38, 8, 48)),
    "module that the base lacks": _renamed(QPROJ.replace("layers.0", "layers.7")),
    "module that is a vector": _renamed(f"{PREFIX}model.norm.miss_block"),
    "name without prefix": _renamed("q_proj.miss_block"),
    "unknown tensor": _tensors(**{f"{PREFIX}model.norm.scale": _full(0, 2)}),
    "prompt embeddings": _tensors(prompt_embeddings=_full(0, 2)),
    "saved tensor without a place": _tensors(**{f"{PREFIX}model.extra.weight": _full(0, 2)}),
    "saved tensor of another shape": _tensors(**{f"{PREFIX}model.norm.weight": _full(0, 2)}),
    "saved tensor with NaN": _tensors(**{f"{PREFIX}lm_head.weight": _full(float("nan"), 120, 48)}),
    "saved twice": _tensors(
        **{f"{PREFIX}lm_head.{kind}": _full(0, 120, 48) for kind in ("weight", "base_layer.weight")}
    ),
    "no shards": lambda a: write_tensors(a.path / WEIGHTS, {}),
    "cut": lambda a: os.truncate(a.path / WEIGHTS, 2000),
    "no bytes": lambda a: (a.path / WEIGHTS).write_bytes(b""),
    "no weights": lambda a: (a.path / WEIGHTS).unlink(),
    "no pickle": lambda a: (a.path / WEIGHTS).rename(a.path / PICKLED),
    "one shard missing": lambda a: write_tensors(
        a.path / WEIGHTS, {name: value for name, value in a.tensors.items() if name != QPROJ}
    ),
}


def _first(base: Base) -> Path:
    return min(base.path.glob("*.safetensors"))


def _index(**changes: str | None) -> Callable[[Base], object]:
    """Entries of the index put in, or with None taken out."""

    def change(base: Base) -> None:
        places = json.loads((base.path / INDEX).read_text())["weight_map"] | changes
        kept = {name: place for name, place in places.items() if place is not None}
        edit_json(base.path / INDEX, weight_map=kept)

    return change


def _emptied(base: Base, pattern: str = "*") -> Path:
    for path in base.path.glob(pattern):
        path.unlink()
    return base.path


def _one_file(change: Callable[[Array], Array], name: str) -> Callable[[Base], object]:
    """The base in one file instead, with one tensor changed."""

    def apply(base: Base) -> None:
        _emptied(base, "model*")
        tensors = {key: change(value) if key.endswith(name) else value for key, value in base.tensors.items()}
        write_tensors(base.path / "model.safetensors", tensors)

    return apply


BASES: dict[str, Callable[[Base], object]] = {
    "a file missing": lambda b: _first(b).unlink(),
    "index leads outside": _index(**{"lm_head.weight": "../secret.safetensors"}),
    "index names a tensor too many": _index(**{"ghost.weight": "model-00001-of-00003.safetensors"}),
    "index forgets a tensor": _index(**{"model.norm.weight": None}),
    "index without map": lambda b: (b.path / INDEX).write_text("{}"),
    "no index": lambda b: (b.path / INDEX).unlink(),
    "header not JSON": lambda b: _first(b).write_bytes(b"\x08" + bytes(7) + b"not json"),
    "too long": lambda b: _first(b).write_bytes(_first(b).read_bytes() + bytes(8)),
    "too short": lambda b: os.truncate(_first(b), _first(b).stat().st_size - 8),
    "quantized": _one_file(lambda value: value.astype(np.int8), "q_proj.weight"),
    "NaN": _one_file(lambda value: value * np.float32("nan"), "layers.1.mlp.up_proj.weight"),
    "another shape": _one_file(lambda value: value[:, :40], "layers.1.mlp.up_proj.weight"),
    "config not JSON": lambda b: (b.path / "config.json").write_text("{"),
    "config with odd values": lambda b: edit_json(b.path / "config.json", architectures=5),
    "another family": lambda b: edit_json(b.path / "config.json", model_type="odd"),
    "no config": lambda b: (b.path / "config.json").unlink(),
    "broken link": lambda b: (b.path / "vocab.txt").symlink_to("gone"),
    "an adapter": lambda b: (_emptied(b, "model*"), (b.path / CONFIG).write_text("{}")),
    "nothing": _emptied,
}
