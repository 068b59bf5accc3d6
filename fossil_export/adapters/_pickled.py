"""Adapters saved as PyTorch pickles: read without PyTorch, and without running anything that may be in them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._dtypes import FLOATS, INTEGERS
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints.pickled import read_pickle_header
from fossil_export.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    import numpy as np

_KNOWN = (*FLOATS, *INTEGERS.values())


def read_pickled(path: Path) -> tuple[Header, dict[str, np.ndarray[Any, Any]]]:
    """The tensors of a `.bin`, `.pt` or `.pth` state dict: those that lie in their own order are read by ranges, of the
    others these are the arrays.

    Raises AdapterError for anything but a map of names to plain tensors.
    """
    infos, arrays = [], {}
    header = read_pickle_header(path, AdapterError)
    for info in header.tensors:
        if info.coding is None and info.shape and info.dtype in _KNOWN:
            infos.append(info)
            continue
        infos.append(replace(info, offset=None, coding=None))
        if info.dtype in _KNOWN:
            arrays[info.name] = _values(path, info)
    return replace(header, tensors=tuple(infos)), arrays


def _values(path: Path, info: TensorInfo) -> np.ndarray[Any, Any]:
    import numpy as np

    rows = replace(info, shape=info.shape or (1,))
    try:
        found = read_rows(rows, 0, rows.shape[0], partial(view_rows, LocalFolder(path.parent)))[:]
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    return np.ascontiguousarray(found).reshape(info.shape)
