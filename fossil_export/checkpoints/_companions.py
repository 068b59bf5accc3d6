"""The files of a model folder that are not its weights: config, tokenizer, chat template, code, licence."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._jsonfile import load_json

PROVENANCE = "fossil_export.json"
CERTIFICATE = "fossil_parity.json"
CARD = "README.md"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx[._]data\w*|tflite|ot|npz)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json$",
    re.IGNORECASE,
)
# Weights in any format and their indexes: the base's own, which the merge makes stale.

TRAINING_LEFTOVERS = ("trainer_state.json", "optimizer.safetensors", "adapter_config.json", PROVENANCE, CERTIFICATE)

_MODULES = "modules.json"
_LONGEST = 1 << 20

MODELOPT = "hf_quant_config.json"
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", MODELOPT)
"""What says how a base is quantized, beside its config.json: of other weights than the merged ones."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def companions(source: Folder) -> tuple[dict[str, Path], list[str]]:
    """Files of a base that belong in a merged model, and those that are left behind.

    Keys are paths relative to the folder with forward slashes. Hidden files and folders are passed over
    (version control, caches); a sentence-transformers model keeps the weights of its other modules. The base's
    README.md, its model card, is of another model than the merged one.
    """
    names = source.names()
    modules = _modules(source, names)
    keep: dict[str, Path] = {}
    left: list[str] = []
    for name in names:
        of_module = name.rpartition("/")[0] in modules
        if (is_weights(name) and not of_module) or name in TRAINING_LEFTOVERS or name == CARD:
            left.append(name)
        else:
            keep[name] = source.path / name
    return keep, left


def _modules(source: Folder, names: Sequence[str]) -> set[str]:
    """The folders of a sentence-transformers model's modules, but for the root: those that it lists, or, if its list
    cannot be read, those with a config."""
    if _MODULES not in names:
        return set()
    try:
        listed = load_json(source.read(_MODULES)) if source.size(_MODULES) <= _LONGEST else None
    except (OSError, ValueError, RecursionError):
        listed = None
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if entries:
        found = {posixpath.normpath(path) for entry in entries if isinstance(path := entry.get("path"), str)}
    else:
        found = {folder for folder, _, file in (name.rpartition("/") for name in names) if file == "config.json"}
    return found - {"", "."}


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or is an index of such files."""
    return _WEIGHTS.search(name) is not None


def tokenizer_of(folder: Folder) -> dict[str, Path]:
    """The complete tokenizer in an adapter's `folder`, or nothing: what the trainer saved next to the shards."""
    names = folder.root_names()
    found = {name: folder.path / name for name in TOKENIZER_FILES if name in names}
    folder.check_links(found)
    complete = "tokenizer_config.json" in found and any(name in found for name in VOCABULARIES)
    return found if complete else {}
