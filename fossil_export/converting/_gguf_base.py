"""How llama.cpp knows a model: the families, the names of their tensors, the order of their rows.

Sources: the classes in llama.cpp's conversion/*.py, and gguf's tables of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.converting._form import Part
from fossil_export.converting._options import Options
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging._guess import declared_tie, is_head
from fossil_export.storage import resolve

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a kind of models: `arch` in gguf's MODEL_ARCH, `rotary` if it reorders the rows of q and k
    (`interleaved`), `tied` if transformers ties head and embedding where the config does not say."""

    arch: str
    rotary: bool = False
    tied: bool = False


FAMILIES = {
    "llama": Family("LLAMA", rotary=True),
    "mistral": Family("LLAMA", rotary=True),
    "smollm3": Family("SMOLLM3", rotary=True, tied=True),
    "granite": Family("GRANITE", rotary=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA", tied=True),
    "gemma2": Family("GEMMA2", tied=True),
    "gemma3": Family("GEMMA3", tied=True),
    "gemma3_text": Family("GEMMA3", tied=True),
    "phi3": Family("PHI3"),
}
"""By `model_type`. SmolLM and SmolLM2 are llama; Phi-4 is phi3. Source: the classes in llama.cpp's conversion/*.py."""

HEAD_COUNTS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_TO_LAYERS = re.compile(r"(?:(?:model\.)?language_model\.(?:model\.)?|model\.text_model\.|model\.)?(?=layers\.\d)")


@dataclass(frozen=True)
class Base:
    """The base as its config tells it; `where` the config was found, `text` its part on the language model."""

    where: Path
    text: Mapping[str, Any]
    family: Family
    tied: bool


def base_of(adapter: Adapter, options: Options) -> Base:
    config: Mapping[str, Any] | None
    if options.base_config is not None:
        where = resolve(options.base_config, CheckpointError, "base config")
        where = where / "config.json" if where.is_dir() else where
        config = read_json(where, CheckpointError)
    else:
        assert options.base is not None
        checkpoint = options.base.checkpoint()
        where, config = checkpoint.location, checkpoint.config
        if config is None:
            raise CheckpointError(
                f"{where}: has no config.json, which tells the family of the model; name its folder with --base"
            )
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    kind = text.get("model_type") or config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, and llama.cpp's names are known for {', '.join(FAMILIES)}; merge the "
            "adapter into the base and convert that"
        )
    family = FAMILIES[kind]
    tie = declared_tie(config)
    return Base(where, text, family, family.tied if tie is None else tie)


def names_of(gguf: Any, adapter: Adapter, parts: list[Part], base: Base) -> dict[str, str]:
    """llama.cpp's name of each module's weight. Raises MergeError where there is none."""
    heads = [part.module for part in parts if is_head(part.module)]
    if heads and base.tied:
        raise MergeError(
            f"{base.where}: ties {heads[0]} to the embedding, so llama.cpp has no head to add to; merge the adapter "
            "into the base, which parts them, and convert that"
        )
    embeddings = [part.module for part in parts if part.kind == "embedding"]
    if embeddings and base.tied:
        raise MergeError(
            f"{base.where}: ties the head to {embeddings[0]}, and llama.cpp would take its LoRA for the head too; "
            "merge the adapter into the base, which parts them, and convert that"
        )
    known = gguf.get_tensor_name_map(_kind(gguf, base), count(base, "num_hidden_layers"))
    found: dict[str, str] = {}
    for part in parts:
        plain = part.module.rpartition(".")[2] if is_head(part.module) else _TO_LAYERS.sub("model.", part.module, 1)
        in_layers = plain.startswith("model.layers.") or is_head(plain) or part.kind == "embedding"
        name = known.get_name(plain) if in_layers else None
        if name is not None and (name == "token_embd") == (part.kind == "embedding"):
            found[part.name] = f"{name}.weight"
    missing = [part.name for part in parts if part.name not in found]
    if missing:
        raise MergeError(
            f"{adapter.path}: llama.cpp's {architecture(gguf, base)} has no tensor for {listed(missing)}; merge the "
            "adapter into the base and convert that"
        )
    return found


def count(base: Base, key: str) -> int:
    """A positive number of the config. Where it does not tell the heads of the keys, they are as many as queries'."""
    value = base.text.get(key)
    if value is None and key == "num_key_value_heads":
        return count(base, "num_attention_heads")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{base.where}: {key} is {value!r}, expected a positive integer; name the base's folder with --base"
        )
    return value


def architecture(gguf: Any, base: Base) -> str:
    name: str = gguf.MODEL_ARCH_NAMES[_kind(gguf, base)]
    return name


def _kind(gguf: Any, base: Base) -> Any:
    """gguf's number of the family. Raises MergeError if gguf is older than it."""
    found = getattr(gguf.MODEL_ARCH, base.family.arch, None)
    if found is None:
        raise MergeError(
            f"{base.where}: is of a kind of models ({base.family.arch}) that gguf {version('gguf')}, which is "
            "here, does not know: pip install --upgrade gguf"
        )
    return found


def interleaved(rows: Array, heads: int) -> Array:
    """`rows` (out, r) of q or k in llama.cpp's order: transformers rotates row i of a head with row i + d/2, llama.cpp
    row 2i with row 2i + 1. Source: LlamaModel.permute in llama.cpp's conversion/llama.py."""
    outputs, rank = rows.shape
    return rows.reshape(heads, 2, outputs // heads // 2, rank).swapaxes(1, 2).reshape(outputs, rank)
