"""A LoRA in PEFT's folder, as `convert --to lora` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.artifacts import _peft as peft
from fossil_export.artifacts._kind import ADAPTER_CONFIG, Kind, Look

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact


def _opened(folder: Path) -> Artifact:
    from fossil_export.verifying._lora import LoraFolder, refuse_imports

    refuse_imports(folder)
    return LoraFolder(folder)


_TYPES = ("LORA",)


def _recognised(look: Look) -> bool:
    """A trained LoRA has no record."""
    return peft.is_adapter(look, _TYPES) and (look.record or {}).get("artifact") == "lora"


KIND = Kind(
    name="lora",
    title="adapter",
    recognised=_recognised,
    opened=_opened,
    patterns=peft.PATTERNS,
    config=ADAPTER_CONFIG,
    peft_types=_TYPES,
    parts=peft.parts,
    not_beside=peft.MODEL,
    clash=peft.CLASH,
    replaces=peft.replaces,
)
