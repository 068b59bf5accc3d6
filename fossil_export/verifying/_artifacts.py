"""What can be verified, behind one small interface; its kinds are in artifacts/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fossil_export.adapters import Adapter
from fossil_export.adapters._peft import WEIGHTS
from fossil_export.artifacts import _miss as miss
from fossil_export.artifacts._kind import Look
from fossil_export.artifacts._kinds import KINDS, kind_of, kind_of_file
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import AdapterError, CheckpointError
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens
from fossil_export.verifying._weights import TensorCheck

Progress = Callable[[int], None]


class Artifact(Protocol):
    """What `verify` asks of an artifact. A new kind has a class of its own, which its file in artifacts/ opens."""

    def weights(
        self, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, progress: Progress
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        """The weights level: the tensors as compared (None where they are no checkpoint's) and what is wrong."""

    def incomparable(self) -> str | None:
        """Why the weights level alone would say nothing; None where it compares something."""

    def subject(self, base: Checkpoint, adapter: Adapter, device: str) -> Subject:
        """How to run it."""

    def dtype(self, base: Checkpoint) -> str:
        """The dtype the trainer is run in."""

    def parameters(self, base: Checkpoint) -> int:
        """Roughly how many values it has."""

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        """What is wrong beyond the logits, found by running it once more."""

    def hashes(self) -> list[dict[str, Any]]:
        """Which files it is."""


def open_any(folder: Path) -> Artifact:
    """The artifact in a folder (or that a file is), by its kind; a checkpoint if it is of none.

    Raises CheckpointError or AdapterError, also for a kind that is not verified.
    """
    if (alone := kind_of_file(folder)) is not None:
        return alone.opened(folder)
    path = folder / PROVENANCE
    record = read_json(path, CheckpointError) if path.is_file() else None
    look = Look(folder, tuple(file.name for file in folder.iterdir()), record, AdapterError)
    kind = kind_of(look)
    if kind is None and look.peft_type is not None and look.has(*WEIGHTS):
        miss.refuse(folder)  # of a type that is no kind here
    return (kind or KINDS["merged"]).opened(folder)


def count_parameters(checkpoint: Checkpoint) -> int:
    """How many values its tensors have."""
    return sum(element_count(tensor.shape) for tensor in checkpoint.tensors.values())
