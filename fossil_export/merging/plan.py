"""The plan: which tensor of the merged model comes from where, decided before a byte is written.

Everything hard happens here (names, shapes, ties, refusals); `run` only follows it. The plan is what
`--dry-run` prints and what the provenance file records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.adapters.quantized import quantized_training
from fossil_export.checkpoints.checkpoint import Checkpoint
from fossil_export.checkpoints.companions import TOKENIZER_FILES, companions
from fossil_export.checkpoints.dtypes import BY_TORCH_NAME, FLOATS, torch_name
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.checkpoints.jsonfile import write_json
from fossil_export.checkpoints.stamp import Stamp, check_stamp, stamps_of
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging.config import difference, edited_config
from fossil_export.merging.layout import FilePlan, TensorPlan, lay_out, parse_size, tensor_record
from fossil_export.merging.place import place
from fossil_export.merging.placement import Placement
from fossil_export.storage.hub import Located, locate, names_hub, pinned

if TYPE_CHECKING:
    import torch

    from fossil_export.merging.api import MergeResult

ACTIONS = ("merge", "replace", "add", "cast", "copy")
"""What can be done to a tensor (`TensorPlan.action`)."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do. Paths of `files`, `index` and `companions` are relative to the output folder.

    `base_branch` is the base's revision as it was typed. `config` is the edited config.json, None where the base's is
    taken as it is; `left_behind` lists the base's files that do not belong in the result; `warnings` is what the user
    should know; `stamps` are those of the files that were here when the plan was made.
    """

    adapter: Adapter
    base: Checkpoint
    base_name: str
    base_revision: str | None
    base_branch: str | None
    dtype: str
    files: tuple[FilePlan, ...]
    index: tuple[str, bytes] | None
    config: bytes | None
    config_edits: Mapping[str, Any]
    companions: Mapping[str, Path]
    left_behind: tuple[str, ...]
    warnings: tuple[str, ...]
    stamps: Mapping[Path, Stamp]

    def __repr__(self) -> str:
        done = ", ".join(f"{action} {count}" for action in ACTIONS if (count := self.count(action)))
        return (
            f"<MergePlan of {self.adapter.name} into {self.base_name}: {done}; "
            f"{len(self.files)} files of {self.nbytes:,} bytes, {len(self.companions)} others>"
        )

    def check(self) -> None:
        """Raise CheckpointError where a file that the plan was made from is another one by now."""
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp)

    def fetch(self) -> None:
        """Bring the files here that the run reads; only for what is on the Hub there is something to do."""
        self.adapter.fetch()
        source = self.base.source
        names = [header.path.name for header in self.base.files]
        names += [path.relative_to(source.path).as_posix() for path in self._base_companions()]
        if self.base.folder is not None:  # the record tells one revision from another by them
            names += [name for name in source.root_names() if name.endswith(".json")]
        source.fetch(dict.fromkeys(names))
        source.check(self.base.files)

    def _base_companions(self) -> list[Path]:
        return [path for path in self.companions.values() if path.is_relative_to(self.base.source.path)]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for file in self.files for tensor, _ in file.tensors)

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
        return {
            "adapter": {
                "name": self.adapter.name,
                "revision": self.adapter.revision,
                "path": str(self.adapter.path),
                "variant": self.adapter.variant,
                "rank": self.adapter.rank,
            },
            "base": {"name": self.base_name, "revision": self.base_revision, "path": str(self.base.location)},
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "files": [{"file": file.name, "bytes": file.size, "tensors": len(file.tensors)} for file in self.files],
            "tensors": [tensor_record(tensor) for tensor in self.tensors if tensor.action != "copy"],
            "copied_tensors": self.count("copy"),
            "config_edits": dict(self.config_edits),
            "companions": sorted(self.companions),
            "left_behind": list(self.left_behind),
            "warnings": list(self.warnings),
        }


def plan_merge(
    adapter: Adapter | str | Path,
    base: str | Path | Located | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
) -> MergePlan:
    """Decide how `adapter` is merged into `base`, reading only headers and configs.

    Both are paths or ids on the Hub; `base` defaults to the adapter's `base_model_name_or_path`, at the revision it
    names. Of a base on the Hub only headers are read, by ranges. `dtype` is "auto" (each tensor keeps its own) or a
    torch dtype, or its name, for all floating-point tensors; `max_shard_size` is in bytes or like "5GB", and re-cuts
    the files; None keeps the base's. Raises AdapterError, CheckpointError, HubError or MergeError.
    """
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    dtype = torch_name(dtype)
    if dtype != "auto" and dtype not in BY_TORCH_NAME:
        raise MergeError(f"dtype is {dtype!r}, expected auto, {', '.join(BY_TORCH_NAME)}")
    found = base if isinstance(base, Located) else find_base(adapter, base)
    checkpoint = found.checkpoint()
    placement = place(adapter, checkpoint)

    by_file: dict[str, list[TensorPlan]] = {}
    for header in checkpoint.files:
        tensors = by_file.setdefault(header.path.name, [])
        for info in header.tensors:
            tensors.append(_tensor_plan(info.name, info, placement, dtype))
    for name in placement.added:
        by_file[checkpoint.files[-1].path.name].append(_tensor_plan(name, None, placement, dtype))
    limit = parse_size(max_shard_size) if max_shard_size is not None else None
    files, index = lay_out(checkpoint, by_file, limit)

    config_edits, config = _config(adapter, checkpoint, placement, dtype)
    keep, left = companions(checkpoint.source) if checkpoint.folder is not None else ({}, [])
    if tokenizer := adapter.tokenizer():
        # The model was trained with the tokenizer and chat template that lie beside the shards.
        keep = {name: path for name, path in keep.items() if name not in TOKENIZER_FILES} | tokenizer
    names = {file.name for file in files} | ({index[0]} if index else set())
    keep = {name: path for name, path in keep.items() if name not in names}
    read = {header.path.name for header in checkpoint.files}
    read |= {checkpoint.index_path.name} if checkpoint.index_path is not None else set()
    return MergePlan(
        adapter=adapter,
        base=checkpoint,
        base_name=found.name,
        base_revision=found.revision or (adapter.base_revision if base is None else None),
        base_branch=found.branch,
        dtype=dtype,
        files=files,
        index=index,
        config=config,
        config_edits=config_edits,
        companions=keep,
        left_behind=tuple(name for name in left if name not in names | read),
        warnings=adapter.notes + found.notes + placement.warnings + _quantized(adapter),
        stamps=_stamps(adapter, checkpoint, keep.values()),
    )


def _quantized(adapter: Adapter) -> tuple[str, ...]:
    if not (sign := quantized_training(adapter)):
        return ()
    return (
        f"{adapter.path}: was trained over quantized weights, it seems ({sign}); merged into unquantized ones it is "
        "another model, unless those are the quantized weights dequantized",
    )


def _stamps(adapter: Adapter, base: Checkpoint, companions: Iterable[Path]) -> dict[Path, Stamp]:
    """Of everything that goes into the result and is on this machine."""
    headers = [*base.files, *([adapter.header] if adapter.header is not None else [])]
    found = {header.path: header.stamp for header in headers if header.stamp is not None}
    small = [*companions, *adapter.files, *([base.index_path] if base.index_path is not None else [])]
    small += [base.folder / "config.json"] if base.folder is not None and base.config is not None else []
    return {**stamps_of(small), **adapter.stamps, **found}


def find_base(adapter: Adapter, base: str | Path | None = None) -> Located:
    """Where `base` lies, by default the model that `adapter` names, at its revision; raises CheckpointError."""
    if base is None and not adapter.base_model:
        raise MergeError(f"{adapter.path}: does not name its base model; name it with --base")
    own = str(adapter.base_model)
    wanted = base if base is not None else pinned(own, adapter.base_revision) if names_hub(own) else own
    return locate(wanted, CheckpointError, "base model")


def _tensor_plan(name: str, info: TensorInfo | None, placement: Placement, dtype: str) -> TensorPlan:
    """The plan of one tensor; `info` is the base's tensor of that name, if it has one."""
    source = placement.source(name, info)
    own = info.dtype if info is not None else source.dtype
    target = BY_TORCH_NAME[dtype] if dtype != "auto" and own in FLOATS else own
    return TensorPlan(
        name=name,
        dtype=target,
        shape=source.shape,
        source=source,
        origin="adapter" if name in placement.saved else "base",
        shard=placement.shards.get(name),
        added=info is None,
    )


def _config(
    adapter: Adapter, base: Checkpoint, placement: Placement, dtype: str
) -> tuple[dict[str, Any], bytes | None]:
    if base.config is None:
        needed = [
            what
            for what, is_needed in (("tie_word_embeddings", placement.untie), ("vocab_size", placement.vocab_size))
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
        untie=placement.untie,
        vocab_size=placement.vocab_size,
        torch_dtype=None if dtype == "auto" else dtype,
        task_type=adapter.config.get("task_type"),
        labels=placement.labels,
    )
    edits = difference(base.config, edited)
    return edits, write_json(edited) if edits else None
