"""What an artifact was made from beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fossil_export.adapters import Adapter
from fossil_export.errors import CheckpointError


@dataclass(frozen=True)
class Sum:
    """Adapters whose updates are added in this order, each at its weight."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]

    def __iter__(self) -> Iterator[tuple[Adapter, float]]:
        return iter(zip(self.adapters, self.weights, strict=True))

    @classmethod
    def of(cls, adapter: Adapter) -> Sum:
        """One adapter as it is."""
        return cls((adapter,), (1.0,))

    @property
    def is_plain(self) -> bool:
        """Whether it is one adapter as it is."""
        return self.weights == (1.0,)

    @property
    def only(self) -> Adapter:
        """The only adapter, for artifacts that are made from one. Raises CheckpointError otherwise."""
        if not self.is_plain:
            raise CheckpointError(
                "several adapters, or one at a weight, are in merged models only; name the one this artifact was "
                "made from with --adapter"
            )
        return self.adapters[0]
