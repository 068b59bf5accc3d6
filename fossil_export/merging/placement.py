"""What the adapter changes in the base, before it is laid out in files."""

from __future__ import annotations

from dataclasses import dataclass, field

from fossil_export.adapters import Shard
from fossil_export.checkpoints.header import TensorInfo


@dataclass
class Placement:
    """Changes by the name of the tensor in the base; filled step by step while the plan is made.

    `saved` replaces a tensor by one of the adapter's, `copied` makes a tensor from another one of the base's,
    `shards` adds an update, `added` names tensors that the base does not have. `labels` is the number of
    outputs of a classifier that came with the adapter.
    """

    saved: dict[str, TensorInfo] = field(default_factory=dict)
    copied: dict[str, TensorInfo] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    untie: bool = False
    vocab_size: int | None = None
    labels: int | None = None
    warnings: tuple[str, ...] = ()

    def source(self, name: str, own: TensorInfo | None) -> TensorInfo:
        """Where tensor `name` comes from; `own` is the base's tensor of that name, if it has one."""
        source = self.saved.get(name) or self.copied.get(name) or own
        assert source is not None, name
        return source
