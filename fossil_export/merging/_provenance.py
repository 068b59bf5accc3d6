"""`fossil_export.json`: what was merged into what, so that anyone can check the result or repeat it.

No times or other accidents, and paths only as the user gave them: the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import identity
from fossil_export.checkpoints._jsonfile import MAX_BYTES
from fossil_export.merging._layout import tensor_record
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._quantization_error import Ratio
from fossil_export.merging._survival import SAMPLE_ROWS, Survival
from fossil_export.version import __version__

FORMAT = 1


def provenance(
    plan: MergePlan,
    survival: Mapping[str, Survival],
    digests: Mapping[str, str] | None = None,
    ratios: Mapping[str, Ratio] | None = None,
) -> dict[str, Any]:
    """The record of a merge; with `digests` (SHA-256 of each finished weights file) it holds those of the base too,
    with `ratios` how far training's quantization moved the base."""
    base = plan.base
    adapters = [_adapter_record(adapter) for adapter in plan.adapters]
    if plan.weights != (1.0,):
        adapters = [known | {"weight": weight} for known, weight in zip(adapters, plan.weights, strict=True)]
    record: dict[str, Any] = {
        "format": FORMAT,
        "tool": {"name": "fossil-export", "version": __version__},
        "artifact": "merged",
        **({"adapter": adapters[0]} if len(adapters) == 1 else {"adapters": adapters}),
        "base": {
            "name": plan.base_name,
            "revision": plan.base_revision,
            "weights": identity(base, full=digests is not None),
            "configs": _configs(plan),
        },
        **plan.seen_record(),
        "dtype": plan.dtype,
        **({"quantization": _quantization(plan)} if base.quantized is not None else {}),
        "config_edits": dict(plan.config_edits),
        "companions": sorted(plan.companions),
        "left_behind": list(plan.left_behind),
        "survival": survival_record(survival),
        **({"quantization": ratio_record(ratios)} if ratios else {}),
        "tensors": [],
    }
    for tensor in plan.tensors:
        if tensor.action != "copy":
            entry = tensor_record(tensor)
            if tensor.name in survival:
                entry |= survival[tensor.name].to_dict()
            record["tensors"].append(entry)
    if digests is not None:
        record["files"] = [{"file": file.name, "size": file.size, "sha256": digests[file.name]} for file in plan.files]
    return record


def _quantization(plan: MergePlan) -> dict[str, Any]:
    """The base's format, and whether the result is in it."""
    assert plan.base.quantized is not None
    return {"base": plan.base.quantized.format, "kept": plan.min_survival is not None}


def _adapter_record(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "revision": adapter.revision,
        "base_model": adapter.base_shown,
        "peft_type": adapter.peft_type,
        "variant": adapter.variant,
        "rank": adapter.rank,
        "parameters": adapter.parameters,
        "files": [
            {"file": path.name, "size": path.stat().st_size, "sha256": adapter.hashes[path.name]}
            for path in adapter.files
        ],
    }


def recorded_adapters(record: Mapping[str, Any]) -> list[Any]:
    """What a record has of its adapter, or of each if several were added; whatever stands there."""
    several = record.get("adapters")
    return list(several) if isinstance(several, list) else [record["adapter"]] if "adapter" in record else []


def scales(record: Mapping[str, Any]) -> list[Any]:
    """The weights other than 1 at which the only adapter's updates were added, of it and by tensor."""
    tensors = record.get("tensors")
    entries = [record.get("adapter"), *(tensors if isinstance(tensors, list) else [])]
    return [entry["weight"] for entry in entries if isinstance(entry, Mapping) and "weight" in entry]


def survival_record(survival: Mapping[str, Survival]) -> dict[str, Any]:
    """The total over all merged tensors and how it was sampled."""
    return {**sum(survival.values(), Survival()).to_dict(), "sample_rows_per_tensor": SAMPLE_ROWS}


def ratio_record(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    """q and ‖ΔW‖ by kind of module."""
    return {kind: ratio.to_dict() for kind, ratio in sorted(ratios.items())}


def _configs(plan: MergePlan) -> dict[str, str]:
    """SHA-256 of the base's JSON files and index, small files that tell one revision from another."""
    if plan.base.folder is None:
        return {}
    home = plan.base.home
    names = [name for name in home.root_names() if name.endswith(".json") and home.size(name) <= MAX_BYTES]
    blobs = {name: home.blob(name) or "" for name in names}
    # Of a large file the Hub's id is that hash: it need not come here.
    return {
        name: blob if len(blob) == 64 else hashlib.sha256(home.read(name)).hexdigest() for name, blob in blobs.items()
    }
