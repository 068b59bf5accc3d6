"""The one type every adapter format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._shown import line, table, without_secrets
from fossil_export.adapters._targets import Tails
from fossil_export.adapters._trained import Trained
from fossil_export.checkpoints._checkpoint import sha256
from fossil_export.checkpoints._companions import tokenizer_of
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._folder import Folder, LocalFolder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._stamp import Stamp, check_stamp
from fossil_export.errors import AdapterError, CheckpointError, unreadable
from fossil_export.storage import Needed

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, as `load_adapter` reads it.

    Nothing is read into memory until `array` or `arrays` is called.

    Attributes:
        path: Its folder or file.
        peft_type: The method as its config calls it, "MISS" or "LORA".
        base_model: The base that it names, None if it names none.
        base_revision: The commit or branch of that.
        config: Its adapter_config.json.
        trained: By module: method, rank, scale and tensors.
        saved: Whole tensors that were trained or stored beside it, by the base model's parameter name
            (`lm_head.weight`).
        files: Its files.
        home: The folder of its `files`, which may be on the Hub; they are here once `needed` was fetched.
        pickled: Arrays of pickled adapters, which are no byte ranges.
        below: What some of `saved` were before training, in a resized vocabulary.
        name: What records call it: its id on the Hub, else the path as given.
        revision: Its commit on the Hub.
        notes: Lines that the user should see.
        headers: Of its weights files.
        stamps: Of the files that were read already.
        is_pefts: Whether PEFT loads it as it is.
        keeps_ties: Whether the trainer changed a tied tensor for all that share it (MLX; PEFT parts them).
        unfit: Says of model types why the trainer began from other weights than a checkpoint of them has.
    """

    path: Path
    peft_type: str
    base_model: str | None
    base_revision: str | None
    config: Mapping[str, Any]
    trained: Mapping[str, Trained]
    saved: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    home: Folder = field(repr=False)
    pickled: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)
    below: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)
    name: str = ""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    headers: tuple[Header, ...] = field(default=(), repr=False)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)
    is_pefts: bool = True
    keeps_ties: bool = False
    unfit: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        what = f"{self.peft_type} {self.variant} r={self.rank}, {len(self.trained)} modules"
        more = f", {len(self.saved)} whole tensors" if self.saved else ""
        return line("Adapter", f"{self.name or self.path}: {what}{more}, base {self.base_shown}")

    def _repr_html_(self) -> str:
        kept = sum(map(element_count, (info.shape for info in self.saved.values())))
        rows = [
            ("method", f"{self.variant} ({self.peft_type})" if self.trained else self.peft_type),
            ("rank", self.rank or None),
            ("modules", len(self.trained)),
            ("parameters", f"{self.parameters:,}"),
            ("whole tensors", f"{len(self.saved)} of {kept:,} values" if self.saved else None),
            ("base", self.base_shown),
            ("revision", self.revision),
        ]
        return table(f"Adapter {self.name or self.path}", rows, self.notes, "Notes")

    @property
    def base_shown(self) -> str | None:
        """The name of its base for people and records: a config may hold an address with a password."""
        return without_secrets(self.base_model)

    @property
    def is_here(self) -> bool:
        """Whether all of its files are on this machine."""
        return all(path.is_file() for path in self.files)

    @property
    def nbytes(self) -> int:
        """Size of its files and its tokenizer."""
        return sum(map(self.home.size, self.needed.names))

    @property
    def needed(self) -> Needed:
        """Its files and its tokenizer, which a run reads."""
        names = (*(path.name for path in self.files), *self.tokenizer())
        return Needed(self.home, names, self.headers)

    def check(self) -> None:
        """Raise AdapterError where a file of it is another one than that which was read."""
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp, AdapterError)
        for header in self.headers:
            check_stamp(header.path, header.stamp, AdapterError)

    def tokenizer(self) -> dict[str, Path]:
        """The complete tokenizer that the trainer saved beside the shards, by name, or nothing."""
        return tokenizer_of(self.home)

    @cached_property
    def wholes(self) -> Tails:
        """The ends of the names of modules that were trained whole."""
        return Tails(self.config.get("modules_to_save") or ())

    @cached_property
    def variant(self) -> str:
        """The method of its modules."""
        return "+".join(dict.fromkeys(one.method for one in self.trained.values()))

    @cached_property
    def rank(self) -> int:
        """The largest of its modules' ranks."""
        return max((one.rank for one in self.trained.values()), default=0)

    @cached_property
    def parameters(self) -> int:
        """Number of trained values beside the weights."""
        found = {info.name: info.shape for one in self.trained.values() for info in one.tensors.values()}
        return sum(map(element_count, found.values()))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each of its files, by name, which are read once for it. Raises OSError."""
        return {path.name: sha256(path) for path in self.files}

    def arrays(self, module: str) -> dict[str, np.ndarray[Any, Any]]:
        """The trained values of a module by role, in their own dtypes; raises as `array` does."""
        return {role: self.array(info) for role, info in self.trained[module].tensors.items()}

    def array(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """The values of one of this adapter's tensors, or of another file's, in its own dtype; with `start` and `stop`
        those rows of it.

        They are read into memory; what is on the Hub alone comes by a range. Raises AdapterError when it cannot be read
        any more, or the adapter is another one by now.
        """
        if tensor.offset is None:
            found = self.pickled[tensor.name]
            if found.shape != tensor.shape:  # a part of it
                last = tensor.first + element_count(tensor.shape)
                found = found.reshape(-1)[tensor.first : last].reshape(tensor.shape)
            return found[start:stop] if tensor.shape else found
        shape, offset, nbytes = tensor.shape, tensor.offset, tensor.nbytes
        if (start, stop) != (0, None):
            first, last, _ = slice(start, stop).indices(shape[0])
            size = nbytes // max(1, shape[0])
            shape, offset, nbytes = (last - first, *shape[1:]), offset + first * size, (last - first) * size
        ours = tensor.path in self.files
        try:
            folder = self.home if ours else LocalFolder(tensor.path.parent)
            raw = folder.view(tensor.path.name, offset, nbytes)
        except CheckpointError as problem:
            raise AdapterError(str(problem)) from problem
        except OSError as problem:
            raise AdapterError(unreadable(f"{tensor.path}: {tensor.name}", problem)) from problem
        except ValueError as problem:
            raise AdapterError(f"{tensor.path}: {tensor.name} cannot be read: {problem}; fetch it again") from problem
        if ours:
            stamp = next((header.stamp for header in self.headers if header.path == tensor.path), None)
            check_stamp(tensor.path, stamp, AdapterError)
        return raw.view(numpy_dtype(tensor.dtype)).reshape(shape)
