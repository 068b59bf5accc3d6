"""The one type every adapter format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints.companions import tokenizer_of
from fossil_export.checkpoints.dtypes import numpy_dtype
from fossil_export.checkpoints.folder import Folder, LocalFolder
from fossil_export.checkpoints.header import Header, TensorInfo
from fossil_export.checkpoints.stamp import check_stamp
from fossil_export.errors import AdapterError, CheckpointError

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
    `source` is the folder of its `files` (default: where they lie), whose weights have this `header`; those of an
    adapter on the Hub are here once `fetch` was called.
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
    source: Folder | None = field(default=None, repr=False)
    header: Header | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """One line, however many modules there are."""
        what = f"{self.peft_type} {self.variant} r={self.rank}, {len(self.shards)} modules"
        more = f", {len(self.saved)} whole tensors" if self.saved else ""
        return f"<Adapter {self.name or self.path}: {what}{more}, base {self.base_model}>"

    @property
    def is_here(self) -> bool:
        """Whether all of its files are on this machine."""
        return all(path.is_file() for path in self.files)

    @property
    def nbytes(self) -> int:
        """Size of its files and its tokenizer."""
        return sum(map(self._folder.size, [*(path.name for path in self.files), *self.tokenizer()]))

    @cached_property
    def _folder(self) -> Folder:
        return self.source if self.source is not None else LocalFolder(self.files[0].parent)

    def fetch(self) -> None:
        """See that its files and its tokenizer are on this machine, whole; raises HubError."""
        self._folder.fetch([*(path.name for path in self.files), *self.tokenizer()])
        if self.header is not None:
            self._folder.check([self.header])

    def tokenizer(self) -> dict[str, Path]:
        """The complete tokenizer that the trainer saved beside the shards, by name, or nothing."""
        return tokenizer_of(self._folder)

    @cached_property
    def parameters(self) -> int:
        """Number of trained values in the shards."""
        from fossil_export.checkpoints.dtypes import element_count

        return sum(element_count(shard.tensor.shape) for shard in self.shards.values())

    def array(self, tensor: TensorInfo) -> np.ndarray[Any, Any]:
        """The values of one of this adapter's tensors, or of another file's, in its own dtype and shape.

        A read-only view of the mapped file (nothing is copied until it is used); what is on the Hub alone comes by
        a range. Raises AdapterError when the file cannot be read any more.
        """
        if tensor.offset is None:
            return self.pickled[tensor.name]
        ours = tensor.path in self.files
        if ours and self.header is not None:
            check_stamp(tensor.path, self.header.stamp, AdapterError)
        try:
            folder = self._folder if ours else LocalFolder(tensor.path.parent)
            raw = folder.view(tensor.path.name, tensor.offset, tensor.nbytes)
        except CheckpointError as problem:
            raise AdapterError(str(problem)) from problem
        except (OSError, ValueError) as problem:
            raise AdapterError(f"{tensor.path}: {tensor.name} cannot be read: {problem}") from problem
        return raw.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)
