"""Files of weights, of whatever kind: what of them is read while planning."""

from __future__ import annotations

from pathlib import Path

from fossil_export.checkpoints._header import Header, read_header
from fossil_export.errors import CheckpointError, FossilExportError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""How PyTorch's files are called."""


def is_pickle(name: str) -> bool:
    """Whether a weights file of this name is one of PyTorch's."""
    return name.endswith(PICKLES)


def header_of(path: Path, error: type[FossilExportError] = CheckpointError) -> Header:
    """The header of a safetensors file, or what stands for it of a file of PyTorch's; raises `error`."""
    if is_pickle(path.name):
        from fossil_export.checkpoints.pickled import read_pickle_header

        return read_pickle_header(path, error)
    return read_header(path, error)
