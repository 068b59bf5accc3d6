"""What goes beside the merged weights: tokenizer and the like, config, index, and the record last of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.errors import MergeError
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._provenance import provenance
from fossil_export.merging._quantization_error import Ratio, ratios_of
from fossil_export.merging._requantize import refuse_lost
from fossil_export.merging._run import FileResult, merge_files
from fossil_export.merging._survival import Survival
from fossil_export.writing._sink import Sink, SmallFiles


@dataclass(frozen=True)
class Finished:
    """A merge whose files are all there: its `record` (`fossil_export.json`), the survival by tensor and, if training
    saw a quantized base, how far that was from the original, by kind of module."""

    record: Mapping[str, Any]
    survival: Mapping[str, Survival]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)


def finish(plan: MergePlan, results: Iterable[FileResult], sink: SmallFiles) -> Finished:
    """Write to `sink` what a model has beside its weights, when all files of `plan` are there: `results` in any order.

    The record is written last, and before it config and index, without which nothing loads the weights. It has the
    SHA-256 of all files if the results have them. Raises MergeError for a plan that is not `settled`, for a file that
    has no result or another size, and for a quantized model that kept too little of the update; OSError if the sink
    refuses.
    """
    plan.check_settled()
    found = {result.name: result for result in results}
    for file in plan.files:
        if file.name not in found:
            raise MergeError(f"{file.name}: is not merged yet; run its part, then finish")
        if found[file.name].size != file.size:
            raise MergeError(f"{file.name}: is of another merge; run its part again")
    parts = [found[file.name] for file in plan.files]
    survival = {tensor: sums for part in parts for tensor, sums in part.survival.items()}
    refuse_lost(plan, survival)
    digests = {part.name: part.sha256 for part in parts if part.sha256 is not None}
    ratios = ratios_of(plan)
    record = provenance(plan, survival, digests if len(digests) == len(parts) else None, ratios)
    plan.check()
    sink.put({**companions(plan), PROVENANCE: write_json(record)})
    return Finished(record, survival, ratios)


def companions(plan: MergePlan) -> dict[str, bytes | Path]:
    """The files of the merged model that are neither weights nor record, by name: config and index last."""
    found: dict[str, bytes | Path] = dict(plan.companions)
    config = found.pop("config.json", None) if plan.config is None else plan.config
    if config is not None:
        found.pop("config.json", None)
        found["config.json"] = config
    if plan.index is not None:
        found.pop(plan.index[0], None)
        found[plan.index[0]] = plan.index[1]
    return found


def write_model(plan: MergePlan, sink: Sink) -> None:
    """The files of a plan without a record: for what is made of the model, or loads it, at once."""
    merge_files(plan, sink)
    sink.put(companions(plan))
