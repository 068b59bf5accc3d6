"""What can be verified, behind one small interface; its kinds are in artifacts/."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck


class Artifact(Protocol):
    """What `verify` asks of an artifact. A new kind has a class of its own, which its file in artifacts/ opens."""

    def weights(
        self, base: Checkpoint, added: Sum, record: Mapping[str, Any] | None
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        """The weights level: the tensors as compared (None where they are no checkpoint's) and what is wrong."""

    def incomparable(self) -> str | None:
        """Why the weights level alone would say nothing; None where it compares something."""

    def runnable(self) -> AbstractContextManager[Artifact]:
        """The artifact as its runtime can run it, while the context lasts."""

    def subject(self, base: Checkpoint, added: Sum, device: str) -> Subject:
        """How to run it."""

    def dtype(self, base: Checkpoint) -> str:
        """The dtype the trainer is run in."""

    def parameters(self, base: Checkpoint) -> int:
        """Roughly how many values it has."""

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        """What is wrong beyond the logits, found by running it once more."""

    def hashes(self) -> list[dict[str, Any]]:
        """Which files it is."""


def count_parameters(checkpoint: Checkpoint) -> int:
    """How many values its tensors have."""
    return sum(element_count(tensor.shape) for tensor in checkpoint.tensors.values())
