"""What in a folder is part of the model, and so goes to the Hub; everything else stays where it is."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fossil_export.adapters import load_adapter
from fossil_export.checkpoints.checkpoint import open_checkpoint
from fossil_export.checkpoints.companions import CARD, CERTIFICATE, PROVENANCE, TOKENIZER_FILES, is_weights
from fossil_export.checkpoints.folder import LocalFolder
from fossil_export.checkpoints.gguf_file import read_record
from fossil_export.checkpoints.jsonfile import read_json
from fossil_export.errors import CheckpointError, FossilExportError, MissingExtraError, listed

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
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_LINKS = re.compile(
    r"""\]\(\s*(?:<([^>]+)>|([^)\s]+))|^\s*\[[^\]]+\]:\s*<?([^>\s]+)|(?:src|href)\s*=\s*["']([^"']+)""", re.MULTILINE
)
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x1f])")
# How a graph (ONNX, as protobuf has it) names a file of data beside it: key "location", and the length of the value.


@dataclass(frozen=True)
class Parts:
    """The artifact in `folder`: its kind, the names of its files (the card apart), what is left behind, the user's
    card, its records, the config that tells what model it is, and what could not be found out."""

    folder: Path
    kind: str
    names: tuple[str, ...]
    left_behind: tuple[str, ...]
    card: str | None
    record: dict[str, Any] | None
    certificate: dict[str, Any] | None
    config: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        return self.folder / name


def parts_of(path: Path) -> Parts:
    """Look at a folder (or a lone GGUF file) that is to be pushed. Raises CheckpointError where it is no artifact."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: is neither a folder nor a GGUF file; name the folder of the model")
        # What lies beside it, a README.md too, may be about anything.
        told, notes = _told_by_gguf(path.parent, [path.name])
        return Parts(path.parent, "gguf-lora", (path.name,), (), None, told, None, None, notes)
    names = LocalFolder(path).names()
    record = read_json(path / PROVENANCE, CheckpointError) if PROVENANCE in names else None
    kind = _kind(path, names, record)
    card = _text(path / CARD) if CARD in names else None
    wanted = set(_matching(names, (*_ANY, *_OF_KIND[kind])))
    wanted |= {name for name in names if _TEMPLATES.fullmatch(name)}
    modules = [name for name in names if name.endswith(".py") and "/" not in name]
    wanted |= set(modules) if modules and _has_code(path, names) else set()
    companions = (record or {}).get("companions")
    wanted |= {name for name in names if isinstance(companions, list) and name in companions}
    if kind == "merged":
        model = open_checkpoint(path)
        wanted |= {header.path.name for header in model.files}
        wanted |= {model.index_path.name} if model.index_path is not None else set()
    if kind in ("lora", "miss") and "adapter_model.safetensors" in wanted:
        wanted.discard("adapter_model.bin")
    if kind == "onnx":
        wanted |= {
            name for graph in names if graph.endswith(".onnx") and graph in wanted for name in _data(path, graph)
        }
    wanted |= _shown(card or "")
    wanted.discard(CARD)
    notes = ()
    if record is None and kind == "gguf-lora":
        record, notes = _told_by_gguf(path, [name for name in names if name in wanted])
    if record is None and kind == "miss":
        record = _told_by_shards(path)
    described = {"merged": "config.json", "lora": "adapter_config.json", "miss": "adapter_config.json"}.get(kind)
    return Parts(
        folder=path,
        kind=kind,
        names=tuple(name for name in names if name in wanted),
        left_behind=tuple(name for name in names if name not in wanted and name != CARD),
        card=card,
        record=record,
        certificate=read_json(path / CERTIFICATE, CheckpointError) if CERTIFICATE in names else None,
        config=read_json(path / described, CheckpointError) if described in names else None,
        notes=notes,
    )


def _told_by_gguf(folder: Path, names: list[str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The record that a GGUF adapter carries, and why there is none."""
    try:
        found = (read_record(folder / name) for name in names if name.endswith(".gguf"))
        return next(filter(None, found), None), ()
    except MissingExtraError as problem:
        return None, (f"the card does not name the base: {problem}",)


def _told_by_shards(folder: Path) -> dict[str, Any] | None:
    """Of an adapter as PEFT saved it: what its record would say of it."""
    try:
        adapter = load_adapter(folder)
    except FossilExportError:  # it is theirs to push
        return None
    found = {"peft_type": adapter.peft_type, "variant": adapter.variant, "rank": adapter.rank}
    return {"adapter": found | {"parameters": adapter.parameters}}


def _kind(path: Path, names: list[str], record: dict[str, Any] | None) -> str:
    root = [name for name in names if "/" not in name]
    weights = any(name.endswith(".safetensors") for name in root)
    if any(name.endswith(".onnx") for name in root) and not (weights and (record or {}).get("artifact") == "merged"):
        return "onnx"
    if "adapter_config.json" in root:
        found = str(read_json(path / "adapter_config.json", CheckpointError).get("peft_type"))
        if found not in _ADAPTERS:
            raise CheckpointError(f"{path}: holds a {found} adapter; push it with `hf upload`")
        if not any(name in root for name in _OF_KIND["lora"][1:]):
            raise CheckpointError(
                f"{path}: holds an adapter_config.json but no adapter_model.safetensors; name the folder PEFT saved"
            )
        return _ADAPTERS[found]
    if not weights and any(name.endswith(".gguf") for name in root):
        return "gguf-lora"
    if not weights:
        what = f"holds no model, adapter, GGUF file or ONNX graph (only {listed(root)})" if root else "holds no model"
        raise CheckpointError(f"{path}: {what}; name the folder that `merge`, `convert` or `onnx` wrote")
    return "merged"


def _text(path: Path) -> str:
    """A text file with its own line ends."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as problem:
        raise CheckpointError(f"{path}: is not UTF-8; save it as that") from problem


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)]


def _has_code(folder: Path, names: list[str]) -> bool:
    """Whether model or tokenizer bring classes of their own, whose modules lie beside them."""
    configs = _matching(names, ("config.json", "*_config.json"))
    return any("auto_map" in read_json(folder / name, CheckpointError) for name in configs)


def _shown(card: str) -> set[str]:
    """The files that the user's card shows or links to: pictures, mostly; weights are none of them."""
    links = (next(filter(None, found), "") for found in _LINKS.findall(card))
    names = {unquote(link.partition("#")[0].partition("?")[0]).removeprefix("./") for link in links}
    return {name for name in names if not is_weights(name)}


def _data(folder: Path, graph: str) -> Iterator[str]:
    """The files beside a graph that it names as holding its weights."""
    with (folder / graph).open("rb") as file:
        if (folder / graph).stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for found in _LOCATION.finditer(content):
                low, *high = found[1]
                length = (low & 127) + (high[0] << 7 if high else 0)
                name = content[found.end() : found.end() + length].decode(errors="replace")
                yield name.removeprefix("./")
