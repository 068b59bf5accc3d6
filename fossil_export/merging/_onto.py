"""Plans for a base that is open: of a merge, and of one with nothing to merge."""

from __future__ import annotations

from collections.abc import Sequence

from fossil_export._spellings import parse_size
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import planned

FILES_OF = "5GB"
"""The largest file, as in transformers' own save_pretrained."""


def plan_onto(
    base: Checkpoint,
    adapters: Sequence[Adapter] = (),
    weights: Sequence[float] = (),
    *,
    dtype: str = "auto",
    max_shard_size: int | None = None,
) -> MergePlan:
    """What `plan_merge` decides, for these adapters and for the weights that `base` has, whatever training saw."""
    asked = MergePlan(
        adapters=tuple(adapters),
        weights=tuple(weights),
        base=base,
        base_name=str(base.location),
        base_revision=None,
        base_branch=None,
        dtype=dtype,
        max_shard_size=max_shard_size,
        files=(),
        index=None,
        config=None,
        config_edits={},
        companions={},
        left_behind=(),
        warnings=(),
        notes=(),
        undecided=(),
        stamps={},
    )
    return planned(asked, dtype, [None] * len(adapters))


def plan_copy(base: Checkpoint) -> MergePlan:
    """How `base` is written as a plain folder: what is quantized, or in another format, as floats under the names of
    its parameters; config and companions are those of a merge, and the files have the names that transformers looks
    for. `write_model` follows it."""
    return plan_onto(base, max_shard_size=parse_size(FILES_OF))
