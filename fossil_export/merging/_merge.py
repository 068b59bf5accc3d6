"""The whole merge: plan, stage, run, record, publish."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import Shown, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export.errors import listed
from fossil_export.merging._assembling import (
    Prepared,
    beside,
    merging,
    prepare,
    results_in,
    told_replaced,
    told_resumed,
    with_hashes,
    without_hashes,
    write_files,
)
from fossil_export.merging._finish import Finished, finish
from fossil_export.merging._given import AnyGiven
from fossil_export.merging._layout import TensorPlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge
from fossil_export.merging._provenance import ratio_record, survival_record
from fossil_export.merging._quantization_error import Ratio, ratio_warnings
from fossil_export.merging._requantize import LEAST
from fossil_export.merging._run import FileResult
from fossil_export.merging._survival import WARNING_BELOW, Survival
from fossil_export.writing._place import Assembly

if TYPE_CHECKING:
    import torch

    from fossil_export.checkpoints.quantized._trained_on import TrainedOn


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        output: The model's folder, or its address.
        plan: What was done.
        survival: By tensor: how much of the update rounding left (`.survived`, a share).
        seconds: Wall time.
        peak_memory: The process's largest resident size, in bytes.
        warnings: Lines that the user should see.
        ratios: By kind of module, how large the update is beside the quantization error, if training saw a quantized
            base.
        resumed: How many files were finished before this call.
    """

    output: Path | str
    plan: MergePlan
    survival: Mapping[str, Survival]
    seconds: float
    peak_memory: int
    warnings: tuple[str, ...]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    resumed: int = 0

    def __repr__(self) -> str:
        kept = sum(self.survival.values(), Survival()).survived
        share = "" if kept is None else f", {kept:.1%} of the update kept"
        return line(
            "MergeResult",
            f"{self.output}: {len(self.survival)} of {self.plan.parameters} tensors merged{share}, "
            f"{self.plan.nbytes:,} bytes in {self.seconds:.1f} s",
        )

    def _repr_html_(self) -> str:
        kept = sum(self.survival.values(), Survival()).survived
        rows = [
            ("model", self.output),
            ("tensors", f"{len(self.survival)} of {self.plan.parameters} merged"),
            ("update kept", None if kept is None else f"{kept:.2%}"),
            ("adapter", " + ".join(adapter.name for adapter in self.plan.adapters)),
            ("base", self.plan.base_name),
            ("written", f"{readable_bytes(self.plan.nbytes)} in {self.seconds:.1f} s"),
            ("peak memory", readable_bytes(self.peak_memory)),
            ("taken up", f"{self.resumed} files of an earlier run" if self.resumed else None),
        ]
        return table("Merged", rows, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        merged = [tensor for tensor in self.plan.tensors if tensor.name in self.survival]
        return {
            "output": str(self.output),
            "tensors_merged": len(merged),
            "tensors": self.plan.parameters,
            "bytes": self.plan.nbytes,
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "survival": survival_record(self.survival),
            **({"quantization": ratio_record(self.ratios)} if self.ratios else {}),
            "modules": {module: self.survival[t.name].to_dict() for t in merged for module in _modules(t)},
            "plan": self.plan.to_dict(),
            "warnings": list(self.warnings),
        }


@reporting
def merge(
    adapter: AnyGiven,
    output: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
    requantize: bool = False,
    min_survival: float = LEAST,
    trained_on: str | Mapping[str, Any] | TrainedOn = "auto",
    into: str = "trained",
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002  named as the command's option
    progress: Shown = False,
) -> MergeResult:
    """Merge an adapter into its base and write a complete model folder.

    The base is streamed, never loaded. The folder appears only when it is complete and synced. If a merge is
    interrupted, the files that it had finished are kept beside `output`, and the same call goes on from there; with
    other inputs it begins anew.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder"). A list adds the updates of several in their order; a pair
            (adapter, 0.7) adds 0.7 times its update.
        output: Folder to write, or its address in an object store ("s3://bucket/name"). It must not exist, unless
            `overwrite`.
        base: The base model: a folder, a weights file, an address or an id on the Hub. Default: the one that the
            adapter names, at the revision it names.
        weights: A finite number for each adapter, its update being multiplied by it. Default: 1 for each.
        dtype: "auto" (each tensor keeps its own), or the dtype of all floating-point tensors: "float32", "bfloat16",
            "float16" or one of torch's (`torch.bfloat16`).
        max_shard_size: Cut the weights into new files of at most this size: bytes, or text such as "5GB". Default: the
            base's files.
        requantize: True keeps a quantized base's format; False (default) dequantizes it to full precision.
        min_survival: With `requantize`: the share of the update, from 0 to 1, that must be left. Less is a MergeError.
        trained_on: How the base was quantized while the adapter was trained (QLoRA): "nf4", "fp4", "int8", "fp8",
            "unquantized", the settings of a BitsAndBytesConfig as a dict, or "auto" (default): what the adapter's files
            say.
        into: "trained" (default) adds the updates to the base as training saw it, "original" to its stored weights.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        MergeResult: `output` (path or address), `survival` (by tensor, how much of the update rounding left),
            `seconds`, `peak_memory` (bytes), `resumed` (files taken up), `warnings` (lines to show), `plan`, and
            `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> result = fossil_export.merge("my-adapter", "my-model")  # doctest: +SKIP
        >>> result.survival["model.layers.0.self_attn.q_proj.weight"].survived  # doctest: +SKIP
        0.998
    """
    started = time.perf_counter()
    plan = plan_merge(
        adapter,
        base,
        weights=weights,
        dtype=dtype,
        max_shard_size=max_shard_size,
        requantize=requantize,
        min_survival=min_survival,
        trained_on=trained_on,
        into=into,
    )
    return run_merge(plan, output, device=device, overwrite=overwrite, hash=hash, started=started)


@reporting
def run_merge(
    plan: MergePlan,
    output: str | Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002
    progress: Shown = False,
    started: float | None = None,
) -> MergeResult:
    """Carry out a plan that `plan_merge` made.

    The same as `merge`, once the plan has been looked at. Adapter and base must be what they were when it was made.

    Args:
        plan: What `plan_merge` returned.
        output: Folder to write, or its address in an object store ("s3://bucket/name"). It must not exist, unless
            `overwrite`.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.
        started: When the clock of `seconds` began, by `time.perf_counter()`. Default: now.

    Returns:
        MergeResult: `output` (path or address), `survival` (by tensor, how much of the update rounding left),
            `seconds`, `peak_memory` (bytes), `resumed` (files taken up), `warnings` (lines to show), `plan`, and
            `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_merge("my-adapter")  # doctest: +SKIP
        >>> result = fossil_export.run_merge(plan, "my-model", progress=True)  # doctest: +SKIP
    """
    started = time.perf_counter() if started is None else started
    ready = prepare(plan, output, device, overwrite)
    plan, place = ready.plan, ready.place
    with place.assemble(ready.digest.digest, ready.digest.about, overwrite=overwrite) as assembly:
        try:
            done = results_in(plan, assembly)
            left = [file for file in plan.files if file.name not in done]
            assembly.check_room(sum(file.size for file in left) + beside(plan))
            step = merging(plan.files, done)
            results = done | write_files(plan, left, assembly, device=device, hash=hash, progress=step)
            notes = [*told_resumed(place, plan, len(done)), *told_replaced(place, assembly)]
            finished = conclude(plan, results.values(), assembly, hash)
        except OSError as problem:
            plan.check()  # an input that is gone is no fault of the output's
            raise assembly.failed(problem) from problem
        assembly.publish()
    return result_of(ready, finished, started, resumed=len(done), notes=notes)


def conclude(
    plan: MergePlan,
    results: Iterable[FileResult],
    assembly: Assembly,
    hash: bool = False,  # noqa: A002
) -> Finished:
    """`finish`, with the hashes of all files if they are asked for, and with none if not. Raises what `finish` does."""
    return finish(plan, with_hashes(results, assembly) if hash else without_hashes(results), assembly)


def result_of(
    ready: Prepared, finished: Finished, started: float, resumed: int = 0, notes: Sequence[str] = ()
) -> MergeResult:
    """The result of a merge that is published; `started` is when its clock began."""
    plan = ready.plan
    told = (*survival_warnings(plan, finished.survival), *ratio_warnings(plan, finished.ratios))
    return MergeResult(
        output=ready.place.output,
        plan=plan,
        survival=finished.survival,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        warnings=(*plan.warnings, *notes, *told),
        ratios=finished.ratios,
        resumed=resumed,
    )


def _modules(tensor: TensorPlan) -> list[str]:
    return [change.trained.module for change in tensor.weight.changes]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        # Unlike ru_maxrss this is not inherited from the process that started us.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def survival_warnings(plan: MergePlan, survival: Mapping[str, Survival]) -> list[str]:
    total = sum(survival.values(), Survival()).survived
    if total is None and not any(plan.weights):
        return ["every weight is 0: the merged model is the base"]
    if total is None:
        return ["every shard is zero: the adapter was not trained, and the merged model is the base"]
    if total >= WARNING_BELOW:
        return []
    worst = sorted(survival, key=lambda name: survival[name].survived or 0.0)
    if plan.min_survival is not None:
        return [
            f"only {total:.0%} of the update survived quantizing again (least in {listed(worst, 3)}); "
            "merge without --requantize, or serve the adapter beside the quantized model"
        ]
    return [
        f"only {total:.0%} of the update survived rounding (least in {listed(worst, 3)}); "
        "merge with --dtype float32, or keep the shards apart from the weights when you serve the model"
    ]
