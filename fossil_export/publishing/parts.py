"""What in a folder is part of the model, and so goes to the Hub; everything else stays where it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fossil_export.checkpoints.checkpoint import open_checkpoint
from fossil_export.checkpoints.companions import CARD, CERTIFICATE, PROVENANCE, TOKENIZER_FILES
from fossil_export.checkpoints.folder import LocalFolder
from fossil_export.checkpoints.jsonfile import read_json
from fossil_export.errors import CheckpointError, listed

_ADAPTERS = {"LORA": "lora", "MISS": "miss", "BONE": "miss"}

_ANY = (
    "config.json", "generation_config.json", "*processor_config.json", "*.jinja", "*.tiktoken", "*.spm",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "configuration_*.py", "modeling_*.py",
    "tokenization_*.py", "processing_*.py", *TOKENIZER_FILES, PROVENANCE, CERTIFICATE,
)  # fmt: skip
_OF_KIND = {
    "merged": (),
    "lora": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "miss": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "gguf-lora": ("*.gguf",),
    "onnx": ("*.onnx", "*.onnx.data", "*.onnx_data*", "*.onnx_adapter", "genai_config.json"),
}
_LINKS = re.compile(r"""\]\(\s*<?([^)\s>]+)|(?:src|href)\s*=\s*["']([^"']+)""")


@dataclass(frozen=True)
class Parts:
    """The artifact in `folder`: its kind, the names of its files (the card apart), what is left behind, its records."""

    folder: Path
    kind: str
    names: tuple[str, ...]
    left_behind: tuple[str, ...]
    record: dict[str, Any] | None
    certificate: dict[str, Any] | None
    config: dict[str, Any] | None

    def path(self, name: str) -> Path:
        return self.folder / name


def parts_of(path: Path) -> Parts:
    """Look at a folder (or a lone GGUF file) that is to be pushed. Raises CheckpointError where it is no artifact."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: is neither a folder nor a GGUF file; name the folder of the model")
        return Parts(path.parent, "gguf-lora", (path.name,), (), None, None, None)
    names = LocalFolder(path).names()
    kind = _kind(path, names)
    record = read_json(path / PROVENANCE, CheckpointError) if PROVENANCE in names else None
    wanted = set(_matching(names, (*_ANY, *_OF_KIND[kind])))
    wanted |= {name for name in (record or {}).get("companions", ()) if name in names}
    if kind == "merged":
        model = open_checkpoint(path)
        wanted |= {header.path.name for header in model.files}
        wanted |= {model.index_path.name} if model.index_path is not None else set()
    if kind in ("lora", "miss") and "adapter_model.safetensors" in wanted:
        wanted.discard("adapter_model.bin")
    wanted.discard(CARD)
    if CARD in names:
        wanted |= _shown(path, names)
    described = {"merged": "config.json", "lora": "adapter_config.json", "miss": "adapter_config.json"}.get(kind)
    return Parts(
        folder=path,
        kind=kind,
        names=tuple(name for name in names if name in wanted),
        left_behind=tuple(name for name in names if name not in wanted and name != CARD),
        record=record,
        certificate=read_json(path / CERTIFICATE, CheckpointError) if CERTIFICATE in names else None,
        config=read_json(path / described, CheckpointError) if described in names else None,
    )


def _kind(path: Path, names: list[str]) -> str:
    root = [name for name in names if "/" not in name]
    if any(name.endswith(".onnx") for name in root):
        return "onnx"
    if "adapter_config.json" in root:
        found = read_json(path / "adapter_config.json", CheckpointError).get("peft_type")
        if found not in _ADAPTERS:
            raise CheckpointError(f"{path}: holds a {found} adapter; push it with `hf upload`")
        if not any(name in root for name in _OF_KIND["lora"][1:]):
            raise CheckpointError(f"{path}: holds an adapter_config.json but no adapter_model.safetensors")
        return _ADAPTERS[found]
    weights = any(name.endswith(".safetensors") for name in root)
    if not weights and any(name.endswith(".gguf") for name in root):
        return "gguf-lora"
    if not weights:
        raise CheckpointError(
            f"{path}: holds no model, adapter, GGUF file or ONNX graph (only {listed(root)}); name the folder that "
            "`merge`, `convert` or `onnx` wrote"
            if root
            else f"{path}: is empty; name the folder that `merge`, `convert` or `onnx` wrote"
        )
    return "merged"


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)]


def _shown(folder: Path, names: list[str]) -> set[str]:
    """The files that the user's card shows or links to: pictures, mostly."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    links = {(first or second).removeprefix("./").partition("#")[0] for first, second in _LINKS.findall(text)}
    return {name for name in names if name in links}
