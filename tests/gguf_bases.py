"""Small random GGUF models, written with gguf, and what transformers loads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig, GgufConfig

from fossil_export.checkpoints.gguf._families import Weights

Array = np.ndarray[Any, Any]

HIDDEN, MIDDLE, LAYERS, HEADS, GROUPS, WORDS = 256, 512, 2, 4, 2, 128
COMMON: dict[str, Any] = {
    "context_length": 64,
    "block_count": LAYERS,
    "feed_forward_length": MIDDLE,
    "embedding_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 2e-5,
    "rope.freq_base": 20000.0,
    "vocab_size": WORDS,
}
NORM: dict[str, Any] = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}
NO_ROPE: dict[str, Any] = {"rope.freq_base": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": HIDDEN // HEADS},
    "qwen2": {},
    "qwen3": {"attention.head_count": 2, "attention.head_count_kv": 1},
    "phi3": {"attention.head_count_kv": HEADS},
    "stablelm": NORM | {"rope.dimension_count": 16},
    "starcoder2": NORM | {"rope.freq_base": 10000.0},
    "falcon": NORM | {"attention.head_count_kv": 1},
    "bloom": NORM | NO_ROPE | {"attention.head_count_kv": HEADS},
    "gpt2": NORM | NO_ROPE | {"attention.head_count_kv": None},
    "mamba": NO_ROPE
    | {"attention.head_count": 0, "attention.head_count_kv": None, "feed_forward_length": 0}
    | {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 32, "ssm.inner_size": MIDDLE},
    "nemotron": NORM,
    "gemma2": {"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 32},
    "gemma3": {"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 32},
    "qwen2moe": {"expert_count": 4, "expert_used_count": 2},
    "qwen3moe": {"expert_count": 4, "expert_used_count": 2, "attention.key_length": 64},
    "t5": NORM
    | NO_ROPE
    | {
        "attention.key_length": 64,
        "attention.relative_buckets_count": 32,
        "decoder_start_token_id": 0,
        "attention.head_count_kv": HEADS,
    },
}
"""What each one's metadata has beside COMMON, or instead."""
TIED = ("gemma2", "gemma3", "falcon", "bloom", "t5")
FLAT = ("conv", "inp_shexp")
"""Parts of names of tensors that are stored without their dimensions of one."""


def write(path: Path, arch: str = "llama", kind: str = "Q8_0", tied: bool | None = None, **changes: Any) -> Path:
    """A random model of an architecture whose matrices are of one type; `changes` are metadata, None for none."""
    path.parent.mkdir(exist_ok=True)
    given = COMMON | FAMILIES.get(arch, {}) | {key.replace("__", "."): value for key, value in changes.items()}
    tied = arch in TIED if tied is None else tied
    metadata = {f"{arch}.{key}": value for key, value in given.items() if value is not None}
    save(path, arch, metadata, {} if tied else {"output.weight": (np.zeros((WORDS, HIDDEN), np.float32), "F32")})
    rng = np.random.default_rng(sum(map(ord, arch)))
    tensors: dict[str, tuple[Array, str]] = {}
    for name, shape in shapes(path).items():
        if name == "output.weight" and tied:
            continue
        matrix = len(shape) > 1 and shape[-1] >= 256 and not name.startswith("ssm")
        tensors[name] = random(rng, shape, kind) if matrix else (_floats(rng, shape, name), "F32")
    save(path, arch, metadata, tensors)
    return path


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """GGUF's tensors of the model that transformers makes of the metadata at `path`."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    arch = next(name for name in FAMILIES if f"{name}.block_count" in gguf.GGUFReader(path).fields)
    state, found = model.state_dict(), {}
    for name, parameter in names(arch, config.to_dict(), state).items():
        shape = tuple(state[parameter].shape)
        if "down_exps" in name:
            found |= {name.replace("down", part): (shape[0], shape[2], shape[1]) for part in ("gate", "up")}
        if any(part in name for part in FLAT):
            shape = tuple(size for size in shape if size > 1)
        if arch == "gpt2" and any(part in name for part in ("attn_qkv.w", "ffn_down.w", "ffn_up.w", "attn_output.w")):
            shape = shape[::-1]
        found[name] = shape
    return found


def names(arch: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, str]:
    """GGUF's names of parameters. If one were wrong, transformers would not load it, and the models would differ."""
    found = Weights(arch, {}, config).names(state)
    return {f"{name}.weight" if name.endswith("_exps") else name: parameter for name, parameter in found.items()}


def model_class(config: Any) -> Any:
    return transformers.AutoModelForSeq2SeqLM if config.model_type == "t5" else transformers.AutoModelForCausalLM


def save(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, tuple[Array, str]], **more: Any) -> None:
    """Write a GGUF file; tensors are floats (F32), or bytes of a type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata | more).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(97 + n % 26) * (n // 26 + 1) for n in range(WORDS - 1)), "<end>"])
    writer.add_token_types([1] * (WORDS - 1) + [3])
    writer.add_token_merges(["a a", "b b"])
    writer.add_eos_token_id(WORDS - 1)
    writer.add_pad_token_id(WORDS - 1)
    for name, (values, kind) in tensors.items():
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _floats(rng: Any, shape: tuple[int, ...], name: str) -> Array:
    values = rng.normal(0, 0.05, shape).astype(np.float32)
    return -np.exp(values) if "ssm_a" in name else values + ("norm" in name and name.endswith("weight"))


def random(rng: Any, shape: tuple[int, ...], kind: str) -> tuple[Array, str]:
    """Bytes of a type whose floats are finite and not large: every code that there is."""
    if kind == "F32":
        return rng.normal(0, 0.05, shape).astype(np.float32), kind
    label = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[label]
    count = int(np.prod(shape)) // block
    found = rng.integers(0, 256, (count, nbytes), np.uint8)
    wrong = np.arange(count)
    for _ in range(200):
        with np.errstate(all="ignore"):
            values = gguf.dequantize(found[wrong].reshape(1, -1), label).reshape(len(wrong), -1)
        wrong = wrong[~(np.abs(values).max(1) < 100)]
        if not len(wrong):
            return found.reshape(*shape[:-1], shape[-1] // block * nbytes), kind
        found[wrong] = rng.integers(0, 256, (len(wrong), nbytes), np.uint8)
    raise AssertionError(kind)


def loaded(path: Path, folder: Path, config: Any = None) -> Path:
    """The model of a GGUF file as transformers loads and saves it."""
    options = {} if config is None else {"config": config}
    config = config or AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = model_class(config).from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(folder)
    return folder
