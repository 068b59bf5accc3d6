"""Whole trained tensors among the constants of a graph: as they are, transposed, or in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.onnx.graph._weight import stored

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def check_saved(model: Any, adapter: Adapter) -> Iterator[str]:
    """What is wrong with the matrices that came whole with the adapter, one line each.

    One of them is wrong if the graph has floats of its shape, either way round, and none of them are its values. In a
    graph that has none of its shape it lies as codes, and is seen by running the graph alone.
    """
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.name in _FLOATS and len(tensor.shape) == 2:
            by_shape.setdefault(tuple(sorted(map(int, tensor.shape))), []).append(tensor)
    for name, info in adapter.saved.items():
        if len(info.shape) != 2 or name.rpartition(".")[0] in adapter.trained:
            continue
        same = by_shape.get(tuple(sorted(info.shape)), [])
        wanted = np.asarray(adapter.array(info), np.float32)
        if same and not any(_is(wanted, stored(tensor)) for tensor in same):
            yield f"{name}: is not in the graph as it was trained"


def _is(wanted: Any, found: Any) -> bool:
    ways = [found] if found.shape == wanted.shape else []
    ways += [found.T] if found.T.shape == wanted.shape else []
    return any(np.array_equal(wanted.astype(way.dtype), way) for way in ways)
