"""The plan: which tensor of the merged model comes from where.

It is data, and `run` only follows it; how it is made is in `_planning`. It is what `--dry-run` prints and what the
provenance file records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._answers import INTO
from fossil_export._shown import line, readable_bytes, table
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._stamp import Stamp, check_stamp
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.errors import MergeError
from fossil_export.merging._layout import FilePlan, TensorPlan, read_for, tensor_record
from fossil_export.merging._trained_on import Seen
from fossil_export.storage import Needed

if TYPE_CHECKING:
    from fossil_export.checkpoints.quantized._trained_on import TrainedOn

ACTIONS = ("merge", "replace", "add", "requantize", "dequantize", "cast", "copy")
"""What can be done to a tensor (`TensorPlan.action`)."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, as `plan_merge` decides it; paths are relative to the output folder.

    Attributes:
        adapters: The adapters, opened.
        weights: By adapter, what its update is multiplied by.
        base: The base, opened, with the weights that training quantized as it saw them.
        base_name: The base's id on the Hub, or path.
        base_revision: Its commit.
        base_branch: Its revision as it was typed.
        dtype: As for `plan_merge`.
        max_shard_size: In bytes, None for the base's files.
        files: The weights files, with the tensors of each.
        index: Name and content of the index of several files.
        config: The edited config.json, None if the base's is taken as it is.
        config_edits: What was edited in it.
        companions: Other files of the result, by name.
        left_behind: The base's files that do not belong in the result.
        warnings: Lines that the user should see.
        notes: The part of them on where adapters and base were found.
        undecided: By adapter, which head and embedding that came with it only their values can tell apart; `settled`
            looks.
        stamps: Of the files that were here when the plan was made.
        min_survival: With it the base's quantization is kept, if quantizing again leaves so much of the update.
        seen: What is known of the base that training saw.
        into: "trained" or "original": what the updates are added to.
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
    min_survival: float | None = None
    seen: Seen = field(default_factory=Seen)
    into: str = "trained"

    def __repr__(self) -> str:
        return line(
            "MergePlan",
            f"of {' + '.join(adapter.name for adapter in self.adapters)} into {self.base_name}: {self._done()}; "
            f"{len(self.files)} files of {self.nbytes:,} bytes, {len(self.companions)} others",
        )

    def _repr_html_(self) -> str:
        rows = [
            ("adapter", " + ".join(adapter.name for adapter in self.adapters)),
            ("base", self.base_name),
            ("tensors", self._done()),
            ("dtype", self.dtype),
            ("files", f"{len(self.files)} of weights, {readable_bytes(self.nbytes)}; {len(self.companions)} others"),
            ("config", ", ".join(f"{key} = {value}" for key, value in self.config_edits.items())),
            ("left behind", ", ".join(self.left_behind)),
        ]
        return table("Plan of a merge", rows, self.warnings)

    def _done(self) -> str:
        counts = Counter(tensor.action for tensor in self.tensors)  # of a prompt's line: one look at each, of many
        return ", ".join(f"{action} {counts[action]}" for action in ACTIONS if counts[action])

    @property
    def adapter(self) -> Adapter:
        """The only adapter, for exits that take one. Raises MergeError if there are several."""
        if len(self.adapters) > 1:
            raise MergeError(
                f"{self.base_name}: the plan adds {len(self.adapters)} adapters, and this takes one; merge them, then "
                "go on with the merged model"
            )
        return self.adapters[0]

    @property
    def trained_on(self) -> TrainedOn | None:
        """How the base was quantized while the adapters were trained; None if it was not, or if that is not known."""
        return self.seen.how

    def seen_record(self) -> dict[str, Any]:
        """What training saw, as records have it. A base that is stored quantized has no other original."""
        found = self.seen.record()
        if self.trained_on is None:
            return {"trained_on": found} if found is not None else {}
        return {"trained_on": found, "into": self.into if self.base.quantized is None else INTO[0]}

    def check(self) -> None:
        """Raise CheckpointError where a file that the plan was made from is another one by now."""
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp)

    def check_settled(self) -> None:
        """Raise MergeError if its files depend on values that nobody has looked at."""
        if pair := next(filter(None, self.undecided), None):
            raise MergeError(
                f"{self.base_name}: whether {pair[1]} is stored depends on whether it equals {pair[0]}, which the plan "
                "does not know; use fossil_export.settled(plan) in the place of the plan"
            )

    @property
    def needed(self) -> tuple[Needed, ...]:
        """The files that a run reads, which whoever runs it fetches."""
        return self.needed_for(None)

    def needed_for(self, files: Iterable[FilePlan] | None) -> tuple[Needed, ...]:
        """Those that `files` of it are made of, and what is written beside them; None for all."""
        home, headers = self.base.home, self.base.files
        if files is not None:
            read = {path for file in files for tensor, _ in file.tensors for path in read_for(tensor)}
            headers = tuple(header for header in headers if header.path in read)
        names = [header.path.name for header in headers]
        names += [path.relative_to(home.path).as_posix() for path in self._base_companions()]
        if self.base.folder is not None:  # the record tells one revision from another by them
            names += [name for name in home.root_names() if name.endswith(".json")]
        base = Needed(home, tuple(dict.fromkeys(names)), headers, in_place=self.base.can_stay)
        return *(adapter.needed for adapter in self.adapters), base

    def _base_companions(self) -> list[Path]:
        return [path for path in self.companions.values() if path.is_relative_to(self.base.home.path)]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for file in self.files for tensor, _ in file.tensors)

    @property
    def parameters(self) -> int:
        """How many tensors the model has, of which each that stays quantized is one, however many it lies in."""
        if self.min_survival is None:
            return len(self.tensors)
        return len(self.base.tensors) + self.count("add")

    @property
    def merged(self) -> int:
        """How many of them updates are added to."""
        return sum(bool(tensor.weight.changes) and tensor.leads for tensor in self.tensors)

    @property
    def modules(self) -> dict[str, TensorPlan]:
        """The tensor that each trained module changes, by the module's name."""
        return {change.trained.module: tensor for tensor in self.tensors for change in tensor.changes}

    @property
    def rows(self) -> dict[str, TensorPlan]:
        """The tensor that the trained rows of each such module go to, by the module's name."""
        wanted = {
            info.name: one.module
            for adapter in self.adapters
            for one in adapter.trained.values()
            if one.is_rows
            for info in one.tensors.values()
        }
        found: dict[str, TensorPlan] = {}
        for tensor in self.tensors if wanted else ():
            for piece in tensor.pieces:
                if piece.source.name in wanted:
                    found.setdefault(wanted[piece.source.name], tensor)
        return found

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
            | ({"weight": weight} if len(self.adapters) > 1 or weight != 1.0 else {})
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
        ]
        return {
            **({"adapter": adapters[0]} if len(adapters) == 1 else {"adapters": adapters}),
            "base": {"name": self.base_name, "revision": self.base_revision, "path": str(self.base.location)},
            **self.seen_record(),
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
