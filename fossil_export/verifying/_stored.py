"""The dtype a base is stored in."""

from __future__ import annotations

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import TORCH_NAME


def stored_dtype(base: Checkpoint) -> str:
    """The dtype most of the base's values are stored in, which transformers and PEFT train it in by default."""
    sizes: dict[str, int] = {}
    for tensor in base.tensors.values():
        if tensor.dtype in TORCH_NAME:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return TORCH_NAME[max(sizes, key=lambda name: sizes[name])] if sizes else "float32"
