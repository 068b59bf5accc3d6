"""The LoRA that a module is: B A is the update, A (r, in), B (out, r), alpha = r.

It is the method's low-rank form (methods/_low_rank.py). A method whose update depends on the weight has none; its LoRA
is the nearest of some rank (see `_nearest`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.converting._widths import Shapes
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def exact_lora(adapter: Adapter, shapes: Shapes) -> Iterator[tuple[str, Array, Array]]:
    """Module, A and B in the trained tensors' own dtype, one module at a time, of an adapter with a `lora_rank`;
    `shapes` are (out, in)."""
    for module, trained in adapter.trained.items():
        outputs, inputs = shapes[module]
        form = METHODS[trained.method].low_rank(finite(adapter, module), trained.numbers, outputs)
        assert form is not None, module
        yield module, np.asarray(form.down_matrix(inputs)), np.ascontiguousarray(form.up)


def lora_rank(adapter: Adapter) -> int | None:
    """The rank of the LoRA that `adapter` is; None if some module is none. Raises AdapterError for different ranks."""
    ranks = {trained.form_rank for trained in adapter.trained.values()}
    if None in ranks:
        return None
    if len(ranks) > 1:
        raise AdapterError(f"{adapter.path}: its modules have different ranks, and the LoRA written here has one")
    return ranks.pop()


def finite(adapter: Adapter, module: str) -> dict[str, Array]:
    """The trained tensors of a module by role; raises AdapterError if its training diverged."""
    arrays = adapter.arrays(module)
    for role, values in arrays.items():
        if not np.isfinite(np.asarray(values, np.float32)).all():
            info = adapter.trained[module].tensors[role]
            raise AdapterError(f"{info.path}: {info.name} holds infinite or NaN values; training diverged")
    return arrays
