"""What decides the bytes of a merged model, as one digest: two processes with the same one make the same files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fossil_export._spellings import device_named
from fossil_export.checkpoints._checkpoint import Checkpoint, identity, sha256
from fossil_export.checkpoints._companions import QUANTIZATION_FILES
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._source import ReadInPlace
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.errors import naming
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.version import __version__

_SAMPLES, _SAMPLE = 8, 4096
"""Pieces of a weights file that are looked at, and bytes of each: few, since a disk may take milliseconds for one."""


@dataclass(frozen=True)
class PlanDigest:
    """`digest` stands for all that decides the bytes, `about` for what that is, by name, in short strings."""

    digest: str
    about: Mapping[str, str]


def plan_digest(plan: MergePlan, device: str = "cpu") -> PlanDigest:
    """Of a plan that is `settled` and whose files are here (`storage.fetch(*plan.needed)`); adapters are read whole,
    of the base what tells its files from others: settings, headers, sizes, times, some of its bytes, ids on the Hub.
    Raises OSError."""
    about = {
        "version": f"fossil-export {__version__}",
        "base": _named(plan.base_name, plan.base_revision, _base(plan)),
        "adapter": " + ".join(
            _named(
                adapter.name if weight == 1.0 else f"{adapter.name}={weight!r}",
                adapter.revision,
                [repr(weight), *adapter.hashes.items()],
            )
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
        ),
        "options": ", ".join(_options(plan, device)),
        "plan": _hash(_tensors(plan)),
    }
    return PlanDigest(_hash([json.dumps(about, sort_keys=True)], 64), about)


def _hash(parts: Iterable[str | bytes], length: int = 12) -> str:
    total = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(b"%d:" % len(content))
        total.update(content)
    return total.hexdigest()[:length]


def _named(name: str, revision: str | None, content: Any) -> str:
    """A name with a short hash of what it stands for."""
    at = f"@{revision[:12]}" if revision else ""
    return f"{name}{at} {_hash([json.dumps(content)])}"


def _options(plan: MergePlan, device: str) -> list[str]:
    """Those of `merge` that decide bytes, as they are typed. (Where sums are made, their order may be another.)"""
    seen = plan.seen_record()
    return [
        f"--dtype {plan.dtype}",
        *([f"--max-shard-size {plan.max_shard_size}"] if plan.max_shard_size is not None else []),
        *([f"--requantize --min-survival {plan.min_survival:g}"] if plan.min_survival is not None else []),
        *([f"--trained-on {json.dumps(seen['trained_on'], sort_keys=True)}"] if seen else []),
        f"--into {plan.into}",
        f"--device {device_named(device).partition(':')[0]}",
    ]


def _base(plan: MergePlan) -> list[Any]:
    base = plan.base
    files: list[Any] = identity(base)
    for record, header in zip(files, base.files, strict=True):
        if "hub_blob" not in record and base.made_of is None:
            record["state"] = _state(base.home, header.path)
    made_of = [] if base.made_of is None else [base.made_of.name, base.made_of.stat().st_size, _looked_at(base.made_of)]
    beside = [[name, *_companion(plan, path)] for name, path in sorted(plan.companions.items())]
    return [plan.base_name, plan.base_revision, files, made_of, beside, _settings(base)]


def _settings(base: Checkpoint) -> list[list[str]]:
    """What says how stored weights are to be read, beside their headers."""
    names = base.home.root_names() if base.folder is not None else ()
    return [
        [name, hashlib.sha256(base.home.read(name)).hexdigest()]
        for name in ("config.json", *QUANTIZATION_FILES)
        if name in names
    ]


def _companion(plan: MergePlan, path: Path) -> list[Any]:
    for home in (plan.base.home, *(adapter.home for adapter in plan.adapters)):
        if path.is_relative_to(home.path):
            if blob := home.blob(path.relative_to(home.path).as_posix()) or _far(home, path):
                return [blob]
            if home is plan.base.home and plan.base.made_of is not None:  # written for this run
                return [sha256(path)]
    return [path.stat().st_size, _time(path)]


def _state(home: Folder, path: Path) -> str:
    """What another file of the same name and size would not have."""
    return _far(home, path) or _looked_at(path)


def _looked_at(path: Path) -> str:
    """Time and a sample of the bytes: copied with its time, or out of an image whose files have all one time, another
    model's file has the same name, size, header and time."""
    size = path.stat().st_size
    total = hashlib.sha256()
    with naming(path), path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * (number + 1) // _SAMPLES)
            total.update(file.read(_SAMPLE))
    return f"{_time(path)} {total.hexdigest()}"


def _far(home: Folder, path: Path) -> str | None:
    """That of a file of which a copy may be here, on each machine another one: what its place calls it, or else the
    name of the copy, in which the state of the whole folder is; None for a file that is only here."""
    if not isinstance(home, ReadInPlace):
        return None
    return home.etag(path.relative_to(home.path).as_posix()) or path.as_posix().rpartition("/objects/")[2]


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _tensors(plan: MergePlan) -> Iterable[str | bytes]:
    """The files, and where every tensor in them comes from."""
    yield json.dumps(dict(plan.config_edits), sort_keys=True, default=str)
    yield plan.config or b"-"
    yield plan.index[1] if plan.index is not None else b"-"
    for file in plan.files:
        yield file.name
        yield file.header
        for tensor, offset in file.tensors:
            yield f"{offset} {_told(tensor)}"


def _told(tensor: TensorPlan) -> str:
    found = f"{tensor.name} {tensor.dtype} {tensor.shape} {_source(tensor.source)} {tensor.owner} {tensor.added}"
    for change in tensor.changes:
        one = change.trained
        trained = [(role, _source(info), one.columns.get(role)) for role, info in one.tensors.items()]
        found += f" + {change.adapter} {change.weight!r} {one.module} {one.method} {trained}"
        found += f" {sorted(one.numbers.items())} {_matrix(change.into)}"
    for piece in tensor.pieces:
        found += f" | {piece.span} {_source(piece.source)} {piece.order} {piece.adapter} {piece.above}"
    return found if tensor.encodes is None else f"{found} = {_told(tensor.encodes)}"


def _matrix(matrix: Matrix) -> str:
    """How it lies in its tensors."""
    own = [getattr(matrix, name) for name in _numbers_of(type(matrix))]
    return f"{type(matrix).__name__} {matrix.span} {matrix.shape} {own} {[_source(one) for one in matrix.stored]}"


@cache
def _numbers_of(layout: type) -> tuple[str, ...]:
    """The fields that are no tensors."""
    return tuple(field.name for field in fields(layout) if field.name != "info")


def _source(info: TensorInfo) -> str:
    coding = "" if info.coding is None else f"{type(info.coding).__name__}{[one.name for one in info.coding.stored]}"
    return f"{info.path.name} {info.name} {info.dtype} {info.shape} {info.offset} {info.first} {coding}"
