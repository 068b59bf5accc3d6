"""Tiny random bases and adapters. They are written by hand: no library decides what lies in them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int8": "I8"}
NUMPY: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16}
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM"}
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {
            "dtype": DTYPES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in tensors.values()))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def pickle(path: Path, tensors: Tensors) -> None:
    """What `torch.save` writes of these."""
    import torch

    torch.save({name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in tensors.items()}, path)


def numbers(rng: random.Random, shape: Sequence[int], dtype: str, scale: float) -> Array:
    made = np.random.default_rng(rng.getrandbits(32)).standard_normal(shape, np.float32)
    return np.asarray(made * scale).astype(NUMPY.get(dtype, dtype))


@dataclass(frozen=True)
class Base:
    """A base on the disk; `modules` are its linear layers, name to (out, in)."""

    path: Path
    tensors: Tensors
    modules: Mapping[str, tuple[int, int]]
    prefix: str


@dataclass(frozen=True)
class Adapter:
    path: Path
    tensors: Tensors


def make_base(
    folder: Path,
    rng: random.Random,
    dtype: str = "float32",
    files: int = 3,
    tie: bool = False,
    family: str = "llama",
    sizes: tuple[int, int, int] = (48, 96, 24),
    layers: int = 2,
    prefix: str = "model.",
    mixed: bool = False,
    lone: bool = False,
) -> Base:
    """A decoder in `files` files; `sizes` are those of hidden, inner, and keys and values.

    `mixed` adds tensors of other dtypes. `lone` gives a weights file with nothing beside it, whose path is the base's.
    """
    hidden, inner, keys = sizes
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if family == "phi3":
        packed = {"self_attn.qkv_proj": (hidden + 2 * keys, hidden), "mlp.gate_up_proj": (2 * inner, hidden)}
        shapes = packed | {name: shapes[name] for name in ("self_attn.o_proj", "mlp.down_proj")}
    head = prefix.removesuffix("model.") + "lm_head" if prefix.endswith("model.") else "lm_head"
    tensors: dict[str, Array] = {f"{prefix}embed_tokens.weight": numbers(rng, (120, hidden), dtype, 0.5)}
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            module = f"{prefix}layers.{layer}.{name}"
            modules[module] = shape
            tensors[f"{module}.weight"] = numbers(rng, shape, dtype, 10 ** rng.uniform(-3, 0))
            if family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{module}.bias"] = numbers(rng, shape[:1], dtype, 0.1)
        tensors[f"{prefix}layers.{layer}.input_layernorm.weight"] = numbers(rng, (hidden,), dtype, 1.0)
        if mixed:
            tensors[f"{prefix}layers.{layer}.self_attn.rotary_emb.inv_freq"] = numbers(rng, (6,), "float32", 1.0)
    tensors[f"{prefix}norm.weight"] = numbers(rng, (hidden,), dtype, 1.0)
    if not tie:
        tensors[f"{head}.weight"] = numbers(rng, (120, hidden), dtype, 0.5)
        modules[head] = (120, hidden)
    if mixed:
        tensors[f"{prefix}position_ids"] = np.arange(16, dtype=np.int64)
    folder.mkdir(parents=True)
    if lone:
        write_tensors(folder / "weights.safetensors", tensors)
        return Base(folder / "weights.safetensors", tensors, modules, prefix)
    _write_files(folder, tensors, files)
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, keys // (hidden // 4)),
        "vocab_size": 120,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
    }
    write_json(folder / "config.json", config)
    _write_companions(folder)
    return Base(folder, tensors, modules, prefix)


def _write_files(folder: Path, tensors: Tensors, files: int) -> None:
    if files == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    places: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = names[number * len(names) // files : (number + 1) * len(names) // files]
        write_tensors(folder / file, {name: tensors[name] for name in mine})
        places |= dict.fromkeys(mine, file)
    total = sum(value.nbytes for value in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_companions(folder: Path) -> None:
    words = {chr(32 + number): number for number in range(95)} | {"<unk>": 95, "<s>": 96}
    characters = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": characters, "model": model}
    write_json(folder / "tokenizer.json", tokenizer)
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<s>"}
    write_json(folder / "tokenizer_config.json", known)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    (folder / "training_args.bin").write_bytes(b"left behind")


def make_adapter(
    folder: Path,
    rng: random.Random,
    base: Base,
    variant: str = "tile",
    rank: int = 8,
    mini: int = 1,
    targets: Iterable[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    layers: Sequence[int] | None = None,
    dtype: str = "float32",
    saved: Iterable[str] = (),
    trained_as: str | None = None,
    form: str = "peft",
    named: bool = True,
    **config: Any,
) -> Adapter:
    """An adapter of `base`, as PEFT lays it out.

    `saved`: what was trained whole, of lm_head, embed_tokens, norm, bias, resized. `trained_as` is the prefix of the
    module names in training. `form` is "peft", "bone", "pickled" or "rwkv" (a lone .pth). Not `named`, it does not
    say what its base is.
    """
    own, saved = tuple(targets), tuple(saved)
    tensors: dict[str, Array] = {}
    suffix = {"bone": "bone_block", "rwkv": "disha"}.get(form, "miss_block")
    start = "" if form == "rwkv" else PREFIX
    prefix = base.prefix if trained_as is None else trained_as
    for module, (outputs, _) in base.modules.items():
        if module.rpartition(".")[2] in own and (layers is None or any(f".{layer}." in module for layer in layers)):
            shape = {"tile": (rank, outputs), "mini": (rank, mini), "bat": (outputs // rank, rank, rank)}[variant]
            name = prefix + module.removeprefix(base.prefix) if module.startswith(base.prefix) else module
            tensors[f"{start}{name}.{suffix}"] = numbers(rng, shape, dtype, 0.05)
    rows = 128 if "resized" in saved else 120
    for name, value in base.tensors.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if kind == "weight" and (last in saved or ("resized" in saved and last in ("lm_head", "embed_tokens"))):
            shape = (rows, *value.shape[1:]) if value.ndim == 2 else value.shape
            tensors[f"{start}{name}"] = numbers(rng, shape, dtype, 0.5)
        if kind == "bias" and "bias" in saved and last in own:
            tensors[f"{start}{module}.base_layer.bias"] = numbers(rng, value.shape, dtype, 0.1)
    folder.mkdir(parents=True)
    if form == "rwkv":
        pickle(folder / "trained.pth", tensors)
        return Adapter(folder / "trained.pth", tensors)
    made: dict[str, Any] = {
        "peft_type": "BONE" if form == "bone" else "MISS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path) if named else None,
        "r": rank,
        "init_weights": {"tile": True, "mini": "mini", "bat": "bat"}[variant],
        "target_modules": list(own),
        "modules_to_save": [name for name in saved if name in ("lm_head", "embed_tokens", "norm")] or None,
        "bias": "miss_only" if "bias" in saved else "none",
    }
    made |= {} if form == "bone" else {"mini_r": mini, "miss_dropout": 0.0}
    write_json(folder / CONFIG, made | config)
    if form == "pickled":
        pickle(folder / PICKLED, tensors)
    else:
        write_tensors(folder / WEIGHTS, tensors)
    return Adapter(folder, tensors)
