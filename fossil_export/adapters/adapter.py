"""The one type every adapter format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.dtypes import numpy_dtype
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Shard:
    """The trained tensor of one module.

    `module` is the name the model had when it was trained (`model.layers.0.self_attn.q_proj`); `variant` is
    "tile", "mini" or "bat"; `rank` is r. The shape of `tensor` is (r, out) for tile, (r, mini_r) for mini
    and (out/r, r, r) for bat.
    """

    module: str
    variant: str
    rank: int
    tensor: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """A trained FOSSIL adapter.

    `shards` is by module; `saved` holds whole tensors that were trained or stored beside the shards, by the
    base model's parameter name (`lm_head.weight`, `model.layers.0.self_attn.q_proj.bias`). Nothing is read
    into memory until `array` is called; arrays of pickled adapters, which are no byte ranges, are in `pickled`.
    `name` is what records call it (its id on the Hub, else the path as given) and `revision` its commit there.
    """

    path: Path
    peft_type: str
    variant: str
    rank: int
    base_model: str | None
    base_revision: str | None
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    saved: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    pickled: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)
    name: str = ""
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> int:
        """Number of trained values in the shards."""
        from fossil_export.checkpoints.dtypes import element_count

        return sum(element_count(shard.tensor.shape) for shard in self.shards.values())

    def array(self, tensor: TensorInfo) -> np.ndarray[Any, Any]:
        """The values of one of this adapter's tensors, in its own dtype and shape.

        A read-only view of the mapped file (nothing is copied until it is used). Raises AdapterError when
        the file cannot be read any more.
        """
        import numpy as np

        if tensor.offset is None:
            return self.pickled[tensor.name]
        try:
            raw = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        except (OSError, ValueError) as problem:
            raise AdapterError(f"{tensor.path}: {tensor.name} cannot be read: {problem}") from problem
        return raw.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)
