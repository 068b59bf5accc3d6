"""What transformers makes of a GGUF file: config, parameters and tokenizer, asked of the installed one.

Source: `from_pretrained(…, gguf_file=…)`, that is transformers/modeling_gguf_pytorch_utils.py. Weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export._extras import required
from fossil_export._libraries import without_panics
from fossil_export.models import _configs, _transformers


@dataclass(frozen=True)
class Made:
    """The model of a GGUF file: the `files` that are saved beside its weights (config.json, generation_config.json),
    its `config` with all defaults, the `shapes` of its parameters, `ties` from a tied parameter to the one that is
    stored, and the keys of the file's metadata that the config was `read` from, without the architecture's name. If the
    config that lay `beside` the file was taken, `differing` are its keys that the metadata says otherwise."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    read: frozenset[str]
    beside: bool = False
    differing: tuple[str, ...] = ()


def keys_read(architecture: str) -> Mapping[str, str | None]:
    """The keys that transformers reads of an architecture, and what its config calls them."""
    required("transformers", "peft", "reading the config of a GGUF file")
    from transformers.integrations import ggml

    name = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture)
    found: Mapping[str, str | None] = ggml.GGUF_CONFIG_MAPPING.get(name, {})
    return found


def make(path: Path, folder: Path, architecture: str, beside: Mapping[str, Any] | None = None) -> Made:
    """The model of the GGUF file at `path`, of which no more than the head is read; `folder` is for its small files.
    `beside` is a config.json that is taken instead, if it names a class and is of the same model type.

    Raises Strange for what transformers makes no model of, and what its code raises for a strange file.
    """
    required("torch", "peft", "reading the config of a GGUF file")
    with _transformers._quiet():
        import transformers

        made = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _configs.cleaned({key: value for key, value in made.to_dict().items() if key != "_name_or_path"})
        differing: list[str] = []
        taken = beside is not None and beside.get("model_type") == made.model_type and bool(beside.get("architectures"))
        if beside is not None and taken:
            told, made = made.to_dict(), _configs.make(_configs.cleaned(beside))
            own = made.to_dict()
            keys = [key for key in keys_read(architecture).values() if key is not None]
            differing = [key for key in keys if not _same(_at(told, key), _at(own, key))]
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
    read = frozenset(keys_read(architecture))
    return Made(files, model.config.to_dict(), shapes, ties, read, taken, tuple(differing))


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key, at the top of a config or of its rotary positions."""
    parameters = config.get("rope_parameters")
    return config.get(key, parameters.get(key) if isinstance(parameters, dict) else None)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))  # float32 in the file
    return bool(one == other)


def save_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of the GGUF file at `path` into `folder`. Raises what transformers raises."""
    required("tokenizers", "peft", "reading the tokenizer of a GGUF file")
    with _transformers._quiet(), without_panics():
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
