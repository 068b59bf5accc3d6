"""The plan: which tensor of the merged model comes from where, decided before a byte is written.

Everything hard happens here (names, shapes, ties, refusals); `run` only follows it. The plan is what
`--dry-run` prints and what the provenance file records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.adapters.quantized import quantized_training
from fossil_export.checkpoints.checkpoint import Checkpoint
from fossil_export.checkpoints.companions import TOKENIZER_FILES, companions
from fossil_export.checkpoints.dtypes import BY_TORCH_NAME, FLOATS, torch_name
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.checkpoints.jsonfile import write_json
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.checkpoints.stamp import Stamp, check_stamp, stamps_of
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging.config import difference, edited_config
from fossil_export.merging.layout import FilePlan, TensorPlan, lay_out, parse_size, tensor_record
from fossil_export.merging.place import place
from fossil_export.merging.placement import Places, together
from fossil_export.merging.ties import are_equal
from fossil_export.storage import Needed, Origin, find_origin, is_path, pinned

if TYPE_CHECKING:
    import torch

    from fossil_export.merging.api import MergeResult

ACTIONS = ("merge", "replace", "add", "cast", "copy")
"""What can be done to a tensor (`TensorPlan.action`)."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do. Paths of `files`, `index` and `companions` are relative to the output folder.

    The updates of `adapters` are added at their `weights`. `undecided` says, by adapter, which head and embedding that
    came with it only their values can tell apart; `settled` looks at these. `base_branch` is the base's revision as it
    was typed. `config` is the edited config.json, None where the base's is taken as it is; `left_behind` lists the
    base's files that do not belong in the result; `warnings` is what the user should know, and `notes` the part of it
    on where adapters and base were found; `stamps` are those of the files that were here when the plan was made.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    base: Checkpoint
    base_name: str
    base_revision: str | None
    base_branch: str | None
    dtype: str
    max_shard_size: int | None
    files: tuple[FilePlan, ...]
    index: tuple[str, bytes] | None
    config: bytes | None
    config_edits: Mapping[str, Any]
    companions: Mapping[str, Path]
    left_behind: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    undecided: tuple[tuple[str, str] | None, ...]
    stamps: Mapping[Path, Stamp]

    def __repr__(self) -> str:
        done = ", ".join(f"{action} {count}" for action in ACTIONS if (count := self.count(action)))
        return (
            f"<MergePlan of {' + '.join(adapter.name for adapter in self.adapters)} into {self.base_name}: {done}; "
            f"{len(self.files)} files of {self.nbytes:,} bytes, {len(self.companions)} others>"
        )

    @property
    def adapter(self) -> Adapter:
        """The only adapter, for exits that take one. Raises MergeError if there are several."""
        if len(self.adapters) > 1:
            raise MergeError(
                f"{self.base_name}: the plan adds {len(self.adapters)} adapters, and this takes one; merge them, then "
                "go on with the merged model"
            )
        return self.adapters[0]

    def settled(self) -> MergePlan:
        """The plan with nothing undecided: heads that are still the embedding stay tied to it. Reads both of them."""
        if not any(self.undecided):
            return self
        tied = [are_equal(adapter, self.base, place(adapter, self.base)) for adapter in self.adapters]
        return _planned(self, self.dtype, tied)

    def with_dtype(self, dtype: str) -> MergePlan:
        """The same merge with all floating-point tensors in another dtype."""
        return _planned(self, dtype, [None] * len(self.adapters))

    def check(self) -> None:
        """Raise CheckpointError where a file that the plan was made from is another one by now."""
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp)

    @property
    def needed(self) -> tuple[Needed, ...]:
        """The files that a run reads, which whoever runs it fetches."""
        source = self.base.source
        names = [header.path.name for header in self.base.files]
        names += [path.relative_to(source.path).as_posix() for path in self._base_companions()]
        if self.base.folder is not None:  # the record tells one revision from another by them
            names += [name for name in source.root_names() if name.endswith(".json")]
        base = Needed(source, tuple(dict.fromkeys(names)), self.base.files)
        return *(adapter.needed for adapter in self.adapters), base

    def _base_companions(self) -> list[Path]:
        return [path for path in self.companions.values() if path.is_relative_to(self.base.source.path)]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for file in self.files for tensor, _ in file.tensors)

    @property
    def modules(self) -> dict[str, TensorPlan]:
        """The tensor that each trained module changes, by the module's name."""
        return {change.trained.module: tensor for tensor in self.tensors for change in tensor.changes}

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Where the weight of each trained module lies, by the module's name."""
        return {change.trained.module: change.into for tensor in self.tensors for change in tensor.changes}

    @property
    def nbytes(self) -> int:
        """Size of the merged weights files."""
        return sum(file.size for file in self.files)

    def count(self, action: str) -> int:
        """Number of tensors with this `action`."""
        return sum(tensor.action == action for tensor in self.tensors)

    def run(
        self,
        output: str | Path,
        *,
        device: str = "cpu",
        overwrite: bool = False,
        hash: bool = False,  # noqa: A002
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> MergeResult:
        """Carry it out: write the model folder `output`. Arguments and errors are those of `merge`."""
        from fossil_export.merging.api import run_plan

        return run_plan(self, output, device=device, overwrite=overwrite, hash=hash, progress=progress)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON shows it: the files, and every tensor that is not simply copied."""
        adapters = [
            {
                "name": adapter.name,
                "revision": adapter.revision,
                "path": str(adapter.path),
                "variant": adapter.variant,
                "rank": adapter.rank,
            }
            | ({"weight": weight} if len(self.adapters) > 1 else {})
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
        ]
        return {
            **({"adapter": adapters[0]} if len(adapters) == 1 else {"adapters": adapters}),
            "base": {"name": self.base_name, "revision": self.base_revision, "path": str(self.base.location)},
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "files": [{"file": file.name, "bytes": file.size, "tensors": len(file.tensors)} for file in self.files],
            "tensors": [tensor_record(tensor) for tensor in self.tensors if tensor.action != "copy"],
            "copied_tensors": self.count("copy"),
            "config_edits": dict(self.config_edits),
            "companions": sorted(self.companions),
            "left_behind": list(self.left_behind),
            **({"undecided": [list(pair) for pair in self.undecided if pair]} if any(self.undecided) else {}),
            "warnings": list(self.warnings),
        }


Given = Adapter | str | Path
"""An adapter: itself, its path or its id on the Hub."""


def plan_merge(
    adapter: Given | Sequence[Given],
    base: str | Path | Origin | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
) -> MergePlan:
    """Decide how `adapter` is merged into `base`, reading only headers and configs.

    Both are paths or ids on the Hub; `base` defaults to the adapter's `base_model_name_or_path`, at the revision it
    names. Of a base on the Hub only headers are read, by ranges. Of several adapters all updates are added, at
    `weights` (default: 1). `dtype` is "auto" (each tensor keeps its own) or a torch dtype, or its name, for all
    floating-point tensors; `max_shard_size` is in bytes or like "5GB", and re-cuts the files; None keeps the base's.
    Raises AdapterError, CheckpointError, HubError or MergeError.
    """
    given = [adapter] if isinstance(adapter, (Adapter, str, Path)) else list(adapter)
    adapters = tuple(one if isinstance(one, Adapter) else load_adapter(one) for one in given)
    if not adapters:
        raise MergeError("there is no adapter to merge; name one")
    found_weights = tuple(weights) if weights is not None else (1.0,) * len(adapters)
    if len(found_weights) != len(adapters) or not all(map(math.isfinite, found_weights)):
        raise MergeError(
            f"weights are {list(found_weights)}, expected a finite number for each of {len(adapters)} adapters"
        )
    dtype = torch_name(dtype)
    if dtype != "auto" and dtype not in BY_TORCH_NAME:
        raise MergeError(f"dtype is {dtype!r}, expected auto, {', '.join(BY_TORCH_NAME)}")
    bases = list(dict.fromkeys(one.base_model for one in adapters if one.base_model))
    if base is None and len(bases) > 1:
        raise MergeError(f"the adapters name different bases ({listed(bases)}); name the one to merge into with --base")
    first = next((one for one in adapters if one.base_model), adapters[0])
    found = base if isinstance(base, Origin) else find_base(first, base)
    asked = MergePlan(
        adapters=adapters,
        weights=found_weights,
        base=found.checkpoint(),
        base_name=found.name,
        base_revision=found.revision or (first.base_revision if base is None else None),
        base_branch=found.branch,
        dtype=dtype,
        max_shard_size=parse_size(max_shard_size) if max_shard_size is not None else None,
        files=(),
        index=None,
        config=None,
        config_edits={},
        companions={},
        left_behind=(),
        warnings=(),
        notes=tuple(note for one in adapters for note in one.notes) + found.notes,
        undecided=(),
        stamps={},
    )
    return _planned(asked, dtype, [None] * len(adapters))


def _planned(asked: MergePlan, dtype: str, tied: Sequence[bool | None]) -> MergePlan:
    """The whole plan for what was `asked`; `tied` is by adapter, as `place` has it."""
    base, adapters = asked.base, asked.adapters
    placements = [place(adapter, base, equal) for adapter, equal in zip(adapters, tied, strict=True)]
    places = together(adapters, placements, asked.weights)
    by_file: dict[str, list[TensorPlan]] = {}
    for header in base.files:
        tensors = by_file.setdefault(header.path.name, [])
        for info in header.tensors:
            tensors.append(_tensor_plan(info.name, info, places, dtype))
    for name in places.added:
        by_file[base.files[-1].path.name].append(_tensor_plan(name, None, places, dtype))
    files, index = lay_out(base, by_file, asked.max_shard_size)

    config_edits, config = _config(adapters[0], base, places, dtype)
    keep, left = companions(base.source) if base.folder is not None else ({}, [])
    for adapter in adapters:
        if tokenizer := adapter.tokenizer():
            # The model was trained with the tokenizer and chat template that lie beside the shards.
            keep = {name: path for name, path in keep.items() if name not in TOKENIZER_FILES} | tokenizer
            break
    names = {file.name for file in files} | ({index[0]} if index else set())
    keep = {name: path for name, path in keep.items() if name not in names}
    read = {header.path.name for header in base.files}
    read |= {base.index_path.name} if base.index_path is not None else set()
    quantized = tuple(line for adapter in adapters for line in _quantized(adapter))
    return replace(
        asked,
        dtype=dtype,
        files=files,
        index=index,
        config=config,
        config_edits=config_edits,
        companions=keep,
        left_behind=tuple(name for name in left if name not in names | read),
        warnings=asked.notes + places.warnings + quantized,
        undecided=places.undecided,
        stamps=_stamps(adapters, base, keep.values()),
    )


def _quantized(adapter: Adapter) -> tuple[str, ...]:
    if not (sign := quantized_training(adapter)):
        return ()
    return (
        f"{adapter.path}: was trained over quantized weights, it seems ({sign}); merged into unquantized ones it is "
        "another model, unless those are the quantized weights dequantized",
    )


def _stamps(adapters: Sequence[Adapter], base: Checkpoint, companions: Iterable[Path]) -> dict[Path, Stamp]:
    """Of everything that goes into the result and is on this machine."""
    headers = [*base.files, *(adapter.header for adapter in adapters if adapter.header is not None)]
    found = {header.path: header.stamp for header in headers if header.stamp is not None}
    small = [*companions, *(path for adapter in adapters for path in adapter.files)]
    small += [base.index_path] if base.index_path is not None else []
    small += [base.folder / "config.json"] if base.folder is not None and base.config is not None else []
    known = {path: stamp for adapter in adapters for path, stamp in adapter.stamps.items()}
    return {**stamps_of(small), **known, **found}


def find_base(adapter: Adapter, base: str | Path | None = None) -> Origin:
    """Where `base` lies, by default the model that `adapter` names, at its revision; raises CheckpointError."""
    if base is None and not adapter.base_model:
        raise MergeError(f"{adapter.path}: does not name its base model; name it with --base")
    own = str(adapter.base_model)
    if base is None:
        base = own if is_path(own) else pinned(own, adapter.base_revision)
    return find_origin(base, CheckpointError, "base model")


def _tensor_plan(name: str, info: TensorInfo | None, places: Places, dtype: str) -> TensorPlan:
    """The plan of one tensor; `info` is the base's tensor of that name, if it has one."""
    source, owner = places.sources.get(name, (info, None))
    assert source is not None, name
    own = info.dtype if info is not None else source.dtype
    target = BY_TORCH_NAME[dtype] if dtype != "auto" and own in FLOATS else own
    return TensorPlan(
        name=name,
        dtype=target,
        shape=source.shape,
        source=source,
        owner=owner,
        changes=places.changes.get(name, ()),
        added=info is None,
    )


def _config(adapter: Adapter, base: Checkpoint, places: Places, dtype: str) -> tuple[dict[str, Any], bytes | None]:
    if base.config is None:
        needed = [
            what
            for what, is_needed in (("tie_word_embeddings", places.untie), ("vocab_size", places.vocab_size))
            if is_needed
        ]
        if needed:
            raise MergeError(
                f"{base.location}: has no config.json, in which {listed(needed)} must change; "
                "name the model's folder with --base"
            )
        return {}, None
    edited = edited_config(
        base.config,
        untie=places.untie,
        vocab_size=places.vocab_size,
        torch_dtype=None if dtype == "auto" else dtype,
        task_type=adapter.config.get("task_type"),
        labels=places.labels,
    )
    edits = difference(base.config, edited)
    return edits, write_json(edited) if edits else None
