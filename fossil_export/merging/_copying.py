"""The plan of a merge with nothing to merge: the base as the floats that it stands for, in plain files."""

from __future__ import annotations

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.merging._layout import parse_size
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import planned

FILES_OF = "5GB"
"""The largest file, as in transformers' own save_pretrained."""


def plan_copy(base: Checkpoint) -> MergePlan:
    """How `base` is written as a plain folder: what is quantized, or in another format, as floats under the names of
    its parameters; config and companions are those of a merge, and the files have the names that transformers looks
    for. `run` and `write_companions` follow it."""
    asked = MergePlan(
        adapters=(),
        weights=(),
        base=base,
        base_name=str(base.location),
        base_revision=None,
        base_branch=None,
        dtype="auto",
        max_shard_size=parse_size(FILES_OF),
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
    return planned(asked, "auto", [])
