"""What transformers makes of a GGUF file: config, parameters and tokenizer, asked of the installed one.

Source: `from_pretrained(…, gguf_file=…)`, that is transformers/modeling_gguf_pytorch_utils.py. Weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export._extras import required
from fossil_export.models import _configs, _transformers


@dataclass(frozen=True)
class Made:
    """The model of a GGUF file: the `files` that are saved beside its weights (config.json, generation_config.json),
    its `config` with all defaults, the `shapes` of its parameters, `ties` from a tied parameter to the one that is
    stored, and the keys of the file's metadata that the config was `read` from, without the architecture's name."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    read: frozenset[str]


def keys_read(architecture: str) -> frozenset[str]:
    """The keys that transformers reads of an architecture."""
    required("transformers", "peft", "reading the config of a GGUF file")
    from transformers.integrations import ggml

    name = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture)
    return frozenset(ggml.GGUF_CONFIG_MAPPING.get(name, {}))


def make(path: Path, folder: Path, architecture: str) -> Made:
    """The model of the GGUF file at `path`, of which no more than the head is read; `folder` is for its small files.

    Raises Strange for what transformers makes no model of, and what its code raises for a strange file.
    """
    required("torch", "peft", "reading the config of a GGUF file")
    with _transformers._quiet():
        import transformers

        made = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        _configs.cleaned({key: value for key, value in made.to_dict().items() if key != "_name_or_path"})
        names = _transformers.classes(made.model_type)
        autos = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
        name = next(iter(made.architectures or [names[auto] for auto in autos if auto in names]), "")
        model = _transformers.build(_transformers.model_class(name), made)
        model.config.dtype = "float32"
        model.config.architectures = [name]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    files = {one.name: one.read_bytes() for one in sorted(folder.iterdir())}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Made(files, model.config.to_dict(), shapes, ties, keys_read(architecture))


def save_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of the GGUF file at `path` into `folder`. Raises what transformers raises."""
    required("tokenizers", "peft", "reading the tokenizer of a GGUF file")
    with _transformers._quiet():
        import transformers

        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
