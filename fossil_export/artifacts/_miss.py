"""The trained adapter itself, as PEFT saved it or as `convert --to miss` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fossil_export.adapters import load_adapter
from fossil_export.artifacts import _peft as peft
from fossil_export.artifacts._kind import ADAPTER_CONFIG, Kind
from fossil_export.errors import CheckpointError, FossilExportError

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact


def told(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What the record of an adapter as PEFT saved it would say of it."""
    try:
        adapter = load_adapter(folder)
    except FossilExportError:  # it is theirs to push
        return None, ()
    found = {"peft_type": adapter.peft_type, "variant": adapter.variant, "rank": adapter.rank}
    return {"adapter": found | {"parameters": adapter.parameters}}, ()


def refuse(folder: Path) -> NoReturn:
    """Raise CheckpointError: an adapter is what others are compared with."""
    raise CheckpointError(f"{folder}: is the trained adapter itself; merge or convert it, and verify the result")


def _opened(folder: Path) -> Artifact:
    refuse(folder)


_TYPES = ("MISS", "BONE")

KIND = Kind(
    name="miss",
    title="adapter",
    recognised=lambda look: peft.is_adapter(look, _TYPES),
    opened=_opened,
    patterns=peft.PATTERNS,
    config=ADAPTER_CONFIG,
    peft_types=_TYPES,
    parts=peft.parts,
    told=told,
    not_beside=peft.MODEL,
    clash=peft.CLASH,
    replaces=peft.replaces,
    verified=False,
)
