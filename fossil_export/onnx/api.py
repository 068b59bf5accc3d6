"""The whole export: adapter and graph in, a folder out that ONNX Runtime or GenAI runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints.companions import PROVENANCE, TOKENIZER_FILES
from fossil_export.checkpoints.dtypes import element_count
from fossil_export.checkpoints.jsonfile import read_json, write_json
from fossil_export.checkpoints.staging import check_destination, staged_folder
from fossil_export.errors import OnnxError, OutputError, listed
from fossil_export.extras import required
from fossil_export.merging.api import write_companions
from fossil_export.merging.plan import MergePlan, plan_merge
from fossil_export.merging.provenance import provenance
from fossil_export.merging.run import run
from fossil_export.onnx.check import check
from fossil_export.onnx.plan import OnnxPlan, check_mode, plan_onnx
from fossil_export.storage import expanded, fetch

RUNTIMES = ("genai", "torch")
PRECISIONS = ("fp32", "fp16", "bf16", "int4")
_MERGED_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int4": "float32"}
# The merged weights are rounded once, to what the graph stores.
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int4": 1}


@dataclass(frozen=True)
class OnnxResult:
    """A finished export. `targets` counts the weights that got shards; `adapter_file` is None unless swappable."""

    output: Path
    graph: Path
    mode: str
    runtime: str
    precision: str | None
    targets: int
    adapter_file: Path | None
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "output": str(self.output),
            "graph": str(self.graph),
            "mode": self.mode,
            "runtime": self.runtime,
            "precision": self.precision,
            "targets": self.targets,
            "adapter_file": None if self.adapter_file is None else str(self.adapter_file),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def export_onnx(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    mode: str = "merged",
    runtime: str | None = None,
    precision: str | None = None,
    onnx: str | Path | None = None,
    copy_data: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> OnnxResult:
    """Write the trained model as an ONNX folder at `output`.

    `mode` is "merged" (plain graph), "tiled" (the base's weights shared, the sum folded at load), "fused"
    (branches with the shards inside) or "swappable" (shards as optional inputs, and an adapter file beside).
    The graph is made from the base by `runtime` "genai" (generative models, with key-value cache) or "torch"
    (everything else), by default the one that fits, in `precision` "fp32", "fp16", "bf16" or "int4"; or it is
    `onnx`, a graph of the base that is there already, whose data file is shared unless `copy_data`. `device`
    "cuda" makes GenAI build for a GPU. `progress` is called with the name of each step.

    The folder appears only when it is complete. Raises a FossilExportError with one line that names the remedy.
    """
    started = time.perf_counter()
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    check_mode(adapter, mode, precision)
    for what, value, known in (("runtime", runtime, RUNTIMES), ("precision", precision, PRECISIONS)):
        if value is not None and value not in known:
            raise OnnxError(f"{what} is {value!r}, expected {', '.join(known)}")
    if onnx is not None and (runtime or precision):
        raise OnnxError("--onnx takes the graph as it is; leave --runtime and --precision out")
    for package in ("onnx", "onnx_ir"):
        required(package)
    merge = plan_merge(adapter, base, dtype="auto")
    fetch(adapter.needed)
    target = expanded(output, OutputError).absolute()
    inputs = [merge.base.location, adapter.path]
    if onnx is not None:
        from fossil_export.onnx.existing import find_graph

        graph: Path | None = find_graph(onnx)
        assert graph is not None
        if target.resolve() in graph.resolve().parents:
            raise OutputError(f"{output}: holds {graph}, which would be replaced; choose another --output")
        # Shared weights take no room; where they must be copied after all, a full disk is an error of its own.
        shared = mode in ("tiled", "swappable") and not copy_data
        runtime, needed = (
            "onnx",
            (graph.stat().st_size if shared else sum(_sizes(graph))) + 4 * adapter.parameters + (64 << 20),
        )
    else:
        graph = None
        runtime, precision = runtime or _default_runtime(merge), precision or "fp32"
        values = sum(element_count(tensor.shape) for tensor in merge.tensors)
        needed = values * (_BYTES[precision] + (4 if mode == "merged" else 0)) + (64 << 20)
        if merge.base.folder is None or merge.base.config is None:
            raise OnnxError(f"{merge.base.location}: has no config.json, from which a graph is made; name the folder")
    check_destination(target, inputs, overwrite)
    merge.check()
    progress("fetching the base")
    fetch(*merge.needed)
    linked: list[str] = []
    with staged_folder(target, needed, overwrite) as folder:
        try:
            if graph is not None:
                plan: OnnxPlan | None
                plan, name, linked = _on_existing(merge, mode, graph, folder, copy_data, progress)
            else:
                assert precision is not None
                plan, name = _on_made(merge, mode, runtime, precision, device, folder, progress)
            file = _write_adapter(plan, folder, folder / name)
            progress("checking the graph")
            check(folder / name)
            record = provenance(merge, {})
            record |= {"artifact": "onnx", "mode": mode, "runtime": runtime, "precision": precision, "graph": name}
            (folder / PROVENANCE).write_bytes(write_json(record))
            merge.check()
        except OSError as problem:
            merge.check()  # an input that is gone is no fault of the output's
            raise OutputError(
                f"{target}: writing failed: {problem.strerror}; make room or choose another --output"
            ) from problem
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return OnnxResult(
        output=target,
        graph=target / name,
        mode=mode,
        runtime=runtime,
        precision=precision,
        targets=len(plan.targets) if plan is not None else merge.count("merge"),
        adapter_file=None if file is None else target / file.name,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        warnings=merge.warnings + tuple(_warnings(merge, mode, linked)),
    )


def _on_made(
    merge: MergePlan,
    mode: str,
    runtime: str,
    precision: str,
    device: str,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[OnnxPlan | None, str]:
    """Make the graph with a builder, then put the shards in (merged mode has them in the weights already)."""
    work = folder / ".model"
    try:
        source = _model_folder(merge, mode, precision, work, progress)
        progress(f"building the graph ({runtime}, {precision})")
        if runtime == "genai":
            from fossil_export.onnx.build_genai import build_genai

            graph = build_genai(source, folder, precision, device)
        else:
            from fossil_export.onnx.build_torch import build_torch

            graph = build_torch(source, folder, precision)
        for name in (*merge.companions, "config.json"):
            place = folder / name
            if (source / name).is_file() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if mode == "merged":
        return None, graph.name
    progress("placing the shards")
    plan = plan_onnx(merge, mode, graph)
    _rewrite(plan, graph)
    return plan, graph.name


def _on_existing(
    merge: MergePlan, mode: str, graph: Path, folder: Path, copy_data: bool, progress: Callable[[str], None]
) -> tuple[OnnxPlan, str, list[str]]:
    from fossil_export.onnx.existing import COMPANIONS, bring_companions, check_saved, share_data

    progress("placing the shards")
    plan = plan_onnx(merge, mode, graph)
    check_saved(plan)
    own = merge.adapter.tokenizer()
    bring_companions(graph, folder, without=TOKENIZER_FILES if own else ())
    for name, path in {**merge.companions, **own}.items():
        if "/" not in name and name in COMPANIONS and not (folder / name).exists():
            shutil.copyfile(path, folder / name)
    if not (folder / "config.json").exists():
        if merge.config is not None:
            (folder / "config.json").write_bytes(merge.config)
        elif merge.base.folder is not None and (merge.base.folder / "config.json").is_file():
            shutil.copyfile(merge.base.folder / "config.json", folder / "config.json")
    linked = [] if _makes_weights(plan) else share_data(graph, folder, copy_data)
    _rewrite(plan, folder / graph.name)
    return plan, graph.name, linked


def _model_folder(merge: MergePlan, mode: str, precision: str, work: Path, progress: Callable[[str], None]) -> Path:
    """The checkpoint the graph is made from: merged, or the base with whatever the adapter brought but shards."""
    if mode == "merged":
        plan = plan_merge(merge.adapter, merge.base.location, dtype=_MERGED_DTYPE[precision])
    else:
        files = tuple(
            replace(file, tensors=tuple((replace(tensor, changes=()), offset) for tensor, offset in file.tensors))
            for file in merge.files
        )
        plan = replace(merge, files=files)
        own = all(path.parent == merge.base.folder or "/" in name for name, path in plan.companions.items())
        if own and plan.config is None and all(tensor.action == "copy" for tensor in plan.tensors):
            assert merge.base.folder is not None
            return merge.base.folder
    progress("merging the weights" if mode == "merged" else "writing the trained modules")
    work.mkdir()
    run(plan, work)
    write_companions(plan, work)
    if plan.config is None and merge.base.folder is not None:
        shutil.copyfile(merge.base.folder / "config.json", work / "config.json")
    return work


def _rewrite(plan: OnnxPlan, path: Path) -> None:
    from fossil_export.onnx import branches, replaced, tiled
    from fossil_export.onnx.edit import Editor
    from fossil_export.onnx.signature import mark

    editor = Editor(plan.model)
    if plan.mode == "swappable":
        mark(plan, editor, branches.swappable(plan, editor))
    else:
        {"merged": replaced.rewrite, "tiled": tiled.rewrite, "fused": branches.fused}[plan.mode](plan, editor)
        mark(plan, editor)
    editor.save(path, repack=_makes_weights(plan))


def _makes_weights(plan: OnnxPlan) -> bool:
    """Whether float weights are made anew, so that the base's data file is no more of use."""
    from fossil_export.onnx.branches import lengthens

    fused = plan.mode == "fused" and any(lengthens(site) for target in plan.targets for site in target.sites)
    return plan.mode == "merged" or fused


def _write_adapter(plan: OnnxPlan | None, folder: Path, graph: Path) -> Path | None:
    if plan is None or plan.mode != "swappable":
        return None
    from fossil_export.onnx.adapter_file import ADAPTER, adapter_arrays, write_adapter
    from fossil_export.onnx.signature import read_signature

    _quiet(folder / "genai_config.json")
    signature = read_signature(graph)
    write_adapter(folder / ADAPTER, adapter_arrays(plan.adapter, signature), signature)
    return folder / ADAPTER


def _quiet(config: Path) -> None:
    """Let GenAI say errors only: ONNX Runtime warns of every optional input when it loads a graph."""
    if not config.is_file():
        return
    record = read_json(config, OnnxError)
    for part in (record.get("model") or {}).values():
        if isinstance(part, dict) and isinstance(part.get("session_options"), dict):
            part["session_options"].setdefault("log_severity_level", 3)
    config.write_bytes(write_json(record))


def _default_runtime(merge: MergePlan) -> str:
    names = (merge.base.config or {}).get("architectures") or []
    edited = merge.config_edits.get("architectures") or names
    return "genai" if any(str(name).endswith("ForCausalLM") for name in edited) else "torch"


def _sizes(graph: Path) -> list[int]:
    return [path.stat().st_size for path in graph.parent.glob(f"{graph.name}*") if path.is_file()]


def _warnings(merge: MergePlan, mode: str, linked: list[str]) -> Iterator[str]:
    whole = [tensor.name for tensor in merge.tensors if tensor.origin == "adapter"]
    if mode == "swappable" and whole:
        yield f"{listed(whole)} were trained whole: they stay in the graph whatever adapter is active"
    if linked:
        yield (
            f"{listed(linked)} is a hard link to the base's, which ONNX Runtime runs and onnx.load refuses, in both "
            "folders; --copy-data makes a file of its own"
        )


__all__ = ["OnnxResult", "export_onnx"]
