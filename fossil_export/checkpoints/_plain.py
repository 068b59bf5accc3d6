"""Whether transformers, given a model's folder, loads what is read here."""

from __future__ import annotations

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._choice import INDEX_ENDING, WEIGHTS

INDEX = f"model{INDEX_ENDING}"


def is_plain(checkpoint: Checkpoint) -> bool:
    """Whether transformers, given the folder, loads these files, and these tensors of them."""
    if any(header.derived for header in checkpoint.files):
        return False
    if any(info.coding is not None for info in checkpoint.tensors.values()):  # as training saw them
        return False
    if checkpoint.folder is None:  # without a config nothing can be loaded, and a copy has none either
        return True
    names = [header.path.name for header in checkpoint.files]
    if checkpoint.index_path is None:
        return names == [WEIGHTS]
    return checkpoint.index_path.name == INDEX and WEIGHTS not in checkpoint.home.root_names()
