"""What in a folder is part of the model, and so goes to the Hub; everything else stays where it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fossil_export.artifacts._kind import Kind, Look, matching
from fossil_export.artifacts._kinds import KINDS, kind_of, kind_of_file
from fossil_export.checkpoints._companions import CARD, CERTIFICATE, PROVENANCE, TOKENIZER_FILES, is_weights
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import CheckpointError, listed

_ANY = (
    "config.json", "generation_config.json", "*processor_config.json", "*.jinja", "*.tiktoken", "*.spm",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "configuration_*.py", "modeling_*.py",
    "tokenization_*.py", "processing_*.py", *TOKENIZER_FILES, PROVENANCE, CERTIFICATE,
)  # fmt: skip
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_LINKS = re.compile(
    r"""\]\(\s*(?:<([^>]+)>|([^)\s]+))|^\s*\[[^\]]+\]:\s*<?([^>\s]+)|(?:src|href)\s*=\s*["']([^"']+)""", re.MULTILINE
)


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
    """Look at a folder, or a file that is an artifact by itself. Raises CheckpointError if it is no artifact."""
    if path.is_file():
        alone = kind_of_file(path)
        if alone is None:
            raise CheckpointError(f"{path}: is neither a folder nor a GGUF file; name the folder of the model")
        # What lies beside it, a README.md too, may be about anything.
        told, notes = alone.told(path.parent, [path.name])
        return Parts(path.parent, alone.name, (path.name,), (), None, told, None, None, notes)
    names = LocalFolder(path).names()
    record = read_json(path / PROVENANCE, CheckpointError) if PROVENANCE in names else None
    kind = _kind(Look(path, tuple(names), record, CheckpointError))
    card = _text(path / CARD) if CARD in names else None
    wanted = _wanted(kind, path, names, record) | _shown(card or "")
    wanted.discard(CARD)
    notes = ()
    if record is None:
        record, notes = kind.told(path, [name for name in names if name in wanted])
    return Parts(
        folder=path,
        kind=kind.name,
        names=tuple(name for name in names if name in wanted),
        left_behind=tuple(name for name in names if name not in wanted and name != CARD),
        card=card,
        record=record,
        certificate=read_json(path / CERTIFICATE, CheckpointError) if CERTIFICATE in names else None,
        config=read_json(path / kind.config, CheckpointError)
        if kind.config is not None and kind.config in names
        else None,
        notes=notes,
    )


def _wanted(kind: Kind, path: Path, names: list[str], record: dict[str, Any] | None) -> set[str]:
    """What belongs to an artifact of this kind, whatever its card shows."""
    wanted = set(matching(names, (*_ANY, *kind.patterns)))
    wanted |= {name for name in names if _TEMPLATES.fullmatch(name)}
    modules = [name for name in names if name.endswith(".py") and "/" not in name]
    wanted |= set(modules) if modules and _has_code(path, names) else set()
    companions = (record or {}).get("companions")
    wanted |= {name for name in names if isinstance(companions, list) and name in companions}
    return kind.parts(path, tuple(names), wanted)


def _kind(look: Look) -> Kind:
    found = kind_of(look)
    if found is not None:
        return found
    path = look.folder
    if any(look.peft_type in kind.peft_types for kind in KINDS.values()):
        raise CheckpointError(
            f"{path}: holds an adapter_config.json but no adapter_model.safetensors; name the folder PEFT saved"
        )
    if look.peft_type is not None:
        raise CheckpointError(f"{path}: holds a {look.peft_type} adapter; push it with `hf upload`")
    root = sorted(look.root)
    what = f"holds no model, adapter, GGUF file or ONNX graph (only {listed(root)})" if root else "holds no model"
    raise CheckpointError(f"{path}: {what}; name the folder that `merge`, `convert` or `onnx` wrote")


def _text(path: Path) -> str:
    """A text file with its own line ends."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as problem:
        raise CheckpointError(f"{path}: is not UTF-8; save it as that") from problem


def _has_code(folder: Path, names: list[str]) -> bool:
    """Whether model or tokenizer bring classes of their own, whose modules lie beside them."""
    configs = matching(names, ("config.json", "*_config.json"))
    return any("auto_map" in read_json(folder / name, CheckpointError) for name in configs)


def _shown(card: str) -> set[str]:
    """The files that the user's card shows or links to: pictures, mostly; weights are none of them."""
    links = (next(filter(None, found), "") for found in _LINKS.findall(card))
    names = {unquote(link.partition("#")[0].partition("?")[0]).removeprefix("./") for link in links}
    return {name for name in names if not is_weights(name)}
