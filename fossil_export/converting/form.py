"""The LoRA that a shard is: B A is the update, A (r, in), B (out, r), alpha = r.

Tile and mini exactly: A[k, j] = 1 where j mod r == k, else 0, and B = Dᵀ with D (r, out) the tile form of the
shard (methods/). Bat's update depends on the weight; its LoRA is the nearest of some rank (see `svd`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.converting.widths import Shapes
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def exact_lora(adapter: Adapter, shapes: Shapes) -> Iterator[tuple[str, Array, Array]]:
    """Module, A and B in the shard's own dtype, one module at a time. For tile and mini; `shapes` are (out, in)."""
    for module, shard in adapter.shards.items():
        values = finite(adapter, module)
        outputs, inputs = shapes[module]
        dense = METHODS[shard.variant].tile_form(values, outputs)
        assert dense is not None
        tiling = (np.arange(inputs) % shard.rank == np.arange(shard.rank)[:, None]).astype(values.dtype)
        yield module, tiling, np.ascontiguousarray(np.asarray(dense).T)


def finite(adapter: Adapter, module: str) -> Array:
    """The shard of a module; raises AdapterError if its training diverged."""
    tensor = adapter.shards[module].tensor
    values = adapter.array(tensor)
    if not np.isfinite(np.asarray(values, np.float32)).all():
        raise AdapterError(f"{tensor.path}: {tensor.name} holds infinite or NaN values; training diverged")
    return values
