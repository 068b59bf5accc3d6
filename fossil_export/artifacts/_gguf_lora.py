"""A GGUF LoRA adapter: a file by itself, or one in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.artifacts._kind import Kind, Look
from fossil_export.checkpoints._gguf_file import read_record
from fossil_export.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact


def _recognised(look: Look) -> bool:
    return look.has("*.gguf") and not look.has("*.safetensors") and look.peft_type is None


def _told(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The record that a GGUF adapter carries, and why there is none."""
    try:
        found = (read_record(folder / name) for name in names if name.endswith(".gguf"))
        return next(filter(None, found), None), ()
    except MissingExtraError as problem:
        return None, (f"the card does not name the base: {problem}",)


def _opened(path: Path) -> Artifact:
    what = "holds GGUF files, which are" if path.is_dir() else "is a GGUF file, which is"
    raise CheckpointError(f"{path}: {what} not verified; verify the LoRA of --to lora")


KIND = Kind(
    name="gguf-lora",
    title="GGUF adapter",
    recognised=_recognised,
    opened=_opened,
    patterns=("*.gguf",),
    suffix=".gguf",
    told=_told,
    by_itself=True,
    verified=False,
    task="text-generation",
)
