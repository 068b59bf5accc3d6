"""Merged models: the weights held against their own computation, and the folder run by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export._progress import begin
from fossil_export.checkpoints._checkpoint import Checkpoint, identity
from fossil_export.merging._naming import names_in
from fossil_export.merging._onto import plan_onto
from fossil_export.merging._planning import settled
from fossil_export.merging._replication import replicated
from fossil_export.verifying._artifacts import count_parameters
from fossil_export.verifying._folder import check_folder
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens, open_artifact
from fossil_export.verifying._requantized import check_requantized
from fossil_export.verifying._seen import plain_base
from fossil_export.verifying._stored import stored_dtype
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck, check_weights


@dataclass(frozen=True)
class MergedFolder:
    """A checkpoint of merged weights."""

    folder: Path
    checkpoint: Checkpoint

    def weights(
        self, base: Checkpoint, added: Sum, record: Mapping[str, Any] | None
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        dtype = (record or {}).get("dtype", "auto")
        plan = settled(plan_onto(base, added.adapters, added.weights, dtype=dtype))
        base = replicated(added.adapters, base)
        problems = list(check_folder(self.checkpoint, base, record, plan))
        tensors: tuple[TensorCheck, ...] | None
        stored = self.checkpoint if self.checkpoint.quantized is None else self.checkpoint.quantized.stored
        step = begin("comparing", sum(info.nbytes for info in stored.tensors.values()), "B")
        if self.checkpoint.quantized is None:
            tensors = check_weights(self.checkpoint, base, added, dtype, step)
        else:
            tensors, more = check_requantized(self.checkpoint, base, added, step)
            problems += more
        return tensors, problems + [f"{check.name} {check.problem}" for check in tensors or () if check.problem]

    @property
    def requantized(self) -> str | None:
        """The quantized format that it is in, which a merge keeps if it is told to; None for plain floats."""
        return self.checkpoint.quantized.format if self.checkpoint.quantized is not None else None

    def incomparable(self) -> str | None:
        return None

    @contextmanager
    def runnable(self) -> Iterator[MergedFolder]:
        """Without what a quantized one would need to be run: the floats that it stands for."""
        with plain_base(self.checkpoint) as plain:
            yield self if plain is self.checkpoint else MergedFolder(plain.location, plain)

    def subject(self, base: Checkpoint, added: Sum, device: str) -> Subject:
        problems: list[str] = []

        def missing(kind: str, name: str) -> None:
            names = names_in(kind, base, False)
            if names is None or names.holds(name):  # what the base lacks too is not the merge's fault
                problems.append(f"{name} is not what {kind} loads, which made random numbers of it")

        return Subject(self.folder, lambda: open_artifact(self.folder, device, missing), problems=problems)

    def dtype(self, base: Checkpoint) -> str:
        return stored_dtype(base)

    def parameters(self, base: Checkpoint) -> int:
        return count_parameters(self.checkpoint)

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        return []

    def hashes(self) -> list[dict[str, Any]]:
        return identity(self.checkpoint)
