"""The files of a model folder that are not its weights: config, tokenizer, chat template, code, licence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fossil_export.errors import CheckpointError

PROVENANCE = "fossil_export.json"
CERTIFICATE = "fossil_parity.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx[._]data\w*|tflite|ot|npz)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json$",
    re.IGNORECASE,
)
# Weights in any format and their indexes: the base's own, which the merge makes stale.

TRAINING_LEFTOVERS = ("trainer_state.json", "optimizer.safetensors", "adapter_config.json", PROVENANCE, CERTIFICATE)

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


def companions(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Files of a base's `folder` that belong in a merged model, and those that are left behind.

    Keys are paths relative to `folder` with forward slashes. Hidden files and folders are passed over
    (version control, caches); a sentence-transformers model keeps the weights of its other modules.
    """
    keep: dict[str, Path] = {}
    left: list[str] = []
    seen = {folder.resolve()}
    has_modules = (folder / "modules.json").is_file()

    def unreadable(problem: OSError) -> None:
        raise CheckpointError(f"{problem.filename}: cannot be read: {problem.strerror}")

    for root, names, files in os.walk(folder, onerror=unreadable, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in [name for name in names if (Path(root) / name).is_symlink()]:
            target = (Path(root) / name).resolve()
            if target in seen or target in folder.resolve().parents:
                names.remove(name)  # a link that leads round in a circle
            seen.add(target)
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = Path(root) / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is a broken link or no regular file; fetch it again or remove it")
            relative = path.relative_to(folder).as_posix()
            of_module = has_modules and "/" in relative and (path.parent / "config.json").is_file()
            stale = is_weights(name) and not of_module
            if stale or relative in TRAINING_LEFTOVERS:
                left.append(relative)
            else:
                keep[relative] = path
    return keep, left


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or is an index of such files."""
    return _WEIGHTS.search(name) is not None


def tokenizer_of(folder: Path) -> dict[str, Path]:
    """The complete tokenizer in an adapter's `folder`, or nothing: what the trainer saved next to the shards."""
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    complete = "tokenizer_config.json" in found and any(name in found for name in VOCABULARIES)
    return found if complete else {}
