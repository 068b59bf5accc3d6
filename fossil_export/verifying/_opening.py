"""From a folder to what is verified of it."""

from __future__ import annotations

from pathlib import Path

from fossil_export.adapters._files import WEIGHTS
from fossil_export.artifacts import _miss as miss
from fossil_export.artifacts._kind import Look
from fossil_export.artifacts._kinds import KINDS, kind_of, kind_of_file
from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import AdapterError, CheckpointError
from fossil_export.verifying._artifacts import Artifact


def open_any(folder: Path, home: Folder | None = None) -> Artifact:
    """The artifact in a folder (or that a file is), by its kind; a checkpoint if it is of none. With `home` the weights
    of a merged model are read there, where they lie.

    Raises CheckpointError or AdapterError, also for a kind that is not verified.
    """
    if home is not None:
        from fossil_export.verifying._merged_folder import MergedFolder

        return MergedFolder(folder, open_checkpoint(home))
    if (alone := kind_of_file(folder)) is not None:
        return alone.opened(folder)
    path = folder / PROVENANCE
    record = read_json(path, CheckpointError) if path.is_file() else None
    look = Look(folder, tuple(file.name for file in folder.iterdir()), record, AdapterError)
    kind = kind_of(look)
    if kind is None and look.peft_type is not None and look.has(*WEIGHTS):
        miss.refuse(folder)  # of a type that is no kind here
    return (kind or KINDS["merged"]).opened(folder)
