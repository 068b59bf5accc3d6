"""A trained adapter itself, of any method that is known, as PEFT saved it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.adapters._trained import formats
from fossil_export.artifacts import _miss as miss
from fossil_export.artifacts import _peft as peft
from fossil_export.artifacts._kind import ADAPTER_CONFIG, Kind, Look

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact


def _recognised(look: Look) -> bool:
    return look.peft_type is not None and peft.is_adapter(look, formats())


def _opened(folder: Path) -> Artifact:
    miss.refuse(folder)


KIND = Kind(
    name="adapter",
    title="adapter",
    recognised=_recognised,
    opened=_opened,
    patterns=peft.PATTERNS,
    config=ADAPTER_CONFIG,
    peft_types=formats(),
    parts=peft.parts,
    told=miss.told,
    not_beside=peft.MODEL,
    clash=peft.CLASH,
    replaces=peft.replaces,
    verified=False,
)
