"""The whole export: adapter and graph in, a folder out that ONNX Runtime or GenAI runs."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fossil_export._foreign import trusting
from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._jsonfile import read_json, write_json
from fossil_export.checkpoints._plain import is_plain
from fossil_export.errors import FossilExportError, OnnxError, OutputError, failed, listed
from fossil_export.merging._finish import write_model
from fossil_export.merging._planning import settled, with_dtype
from fossil_export.merging._provenance import provenance
from fossil_export.onnx._places import OpenGraph, open_graph
from fossil_export.onnx._plan import OnnxPlan, check_packages, decide, open_planned
from fossil_export.onnx._trained import without_updates
from fossil_export.onnx.builders import BUILDERS, PRECISIONS, PrecisionName, RuntimeName
from fossil_export.onnx.builders._existing import companions, share_data
from fossil_export.onnx.graph._check import check
from fossil_export.onnx.modes import MODES, ModeName
from fossil_export.storage import fetch
from fossil_export.writing._place import local_output
from fossil_export.writing._sink import FolderSink
from fossil_export.writing._staging import check_destination, staged_folder


@dataclass(frozen=True)
class OnnxResult:
    """A finished ONNX export.

    Attributes:
        output: The folder.
        graph: The graph in it.
        mode: "merged", "tiled", "fused" or "swappable".
        runtime: Who made the graph.
        precision: Of the graph, None for one that was there.
        targets: How many weights got what was trained.
        adapter_file: The adapter beside a swappable graph, else None.
        nbytes: Size in bytes of what was written.
        seconds: Wall time.
        warnings: Lines that the user should see.
    """

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

    def __repr__(self) -> str:
        return line(
            "OnnxResult",
            f"{self.graph}: {self.targets} weights {self.mode}, {self.nbytes:,} bytes in {self.seconds:.1f} s",
        )

    def _repr_html_(self) -> str:
        rows = [
            ("graph", self.graph),
            ("mode", self.mode),
            ("runtime", self.runtime),
            ("precision", self.precision),
            ("weights", f"{self.targets} with what was trained"),
            ("adapter file", self.adapter_file),
            ("written", f"{readable_bytes(self.nbytes)} in {self.seconds:.1f} s"),
        ]
        return table("Exported", rows, self.warnings)

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


@reporting
def export_onnx(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    mode: ModeName = "merged",
    runtime: RuntimeName | None = None,
    precision: PrecisionName | None = None,
    onnx: str | Path | None = None,
    copy_data: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Shown = False,
) -> OnnxResult:
    """Write the trained model as an ONNX folder that ONNX Runtime or GenAI runs.

    The folder appears only when it is complete.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder").
        output: Folder to write. It must not exist, unless `overwrite`.
        base: The base model: a folder, a weights file, an address or an id on the Hub. Default: the one that the
            adapter names, at the revision it names.
        mode: "merged" (default, a plain graph), "tiled" (the base's weights shared, the sum folded at load), "fused"
            (branches with the shards inside) or "swappable" (shards as optional inputs, and an adapter file beside).
        runtime: Who makes the graph: "genai" (models that generate, with key-value cache) or "torch" (all others).
            Default: the one that fits.
        precision: "fp32" (default), "fp16", "bf16" or "int4".
        onnx: A graph of the base that is there already, file or folder; then no `runtime` and `precision`. Default: one
            is made.
        copy_data: True copies the data file of `onnx`; False (default) shares it by a hard link.
        device: What the graph is for: "cpu" (default) or "cuda".
        trust_remote_code: True runs the Python code that a model's config names in its `auto_map`, as transformers does
            of that name. False (default) refuses such a model.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        OnnxResult: `output` (folder), `graph` (file), `adapter_file` (of a swappable folder, else None), `targets`
            (weights with what was trained), `nbytes`, `seconds`, `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        OnnxError: A graph cannot be read, is not the base's, or cannot take the adapter in this mode.
        MissingExtraError: A package is missing; the extra is named.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> fossil_export.export_onnx("my-adapter", "my-onnx", mode="swappable")  # doctest: +SKIP
    """
    started = time.perf_counter()
    plan = decide(adapter, base, mode, runtime, precision, onnx, copy_data, device, trust_remote_code)
    return run_onnx(plan, output, overwrite=overwrite, started=started)


@reporting
def run_onnx(
    plan: OnnxPlan,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Shown = False,
    started: float | None = None,
) -> OnnxResult:
    """Carry out a plan that `plan_onnx` made.

    Args:
        plan: What `plan_onnx` returned.
        output: Folder to write. It must not exist, unless `overwrite`.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.
        started: When the clock of `seconds` began, by `time.perf_counter()`. Default: now.

    Returns:
        OnnxResult: As of `export_onnx`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        OnnxError: A graph cannot be read or made.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_onnx("my-adapter")  # doctest: +SKIP
        >>> fossil_export.run_onnx(plan, "my-onnx", progress=True)  # doctest: +SKIP
    """
    started = time.perf_counter() if started is None else started
    merge = plan.merge
    check_packages(plan)
    plan.check()  # first, since an input that is gone has no place to hold the output against
    fetch(merge.adapter.needed)
    target = local_output(output)
    if plan.graph is not None and Path(os.path.realpath(target)) in plan.graph.resolve().parents:
        raise OutputError(f"{output}: holds {plan.graph}, which would be replaced; choose another --output")
    check_destination(target, [merge.base.location, merge.adapter.path], overwrite)
    fetch(*merge.needed, whole=True)
    merge = settled(merge)
    plan = replace(plan, merge=merge)
    with staged_folder(target, _room(plan), overwrite) as folder:
        try:
            graph, opened, linked = (_build if plan.graph is None else _take)(plan, folder)
            if opened is not None:
                _rewrite(opened, graph)
            file = _write_adapter(merge.adapter, folder, graph) if MODES[plan.mode].swaps else None
            begin("checking the graph")
            check(graph)
            _record(plan, folder, graph.name)
            plan.check()
        except OnnxError:
            plan.check()  # what was cut or replaced is why
            raise
        except OSError as problem:
            plan.check()  # an input that is gone is no fault of the output's
            raise OutputError(failed(target, problem, folder)) from problem
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return OnnxResult(
        output=target,
        graph=target / graph.name,
        mode=plan.mode,
        runtime=plan.runtime,
        precision=plan.precision,
        targets=len(opened.places) if opened is not None else merge.count("merge"),
        adapter_file=None if file is None else target / file.name,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        warnings=plan.warnings + _of_links(linked),
    )


def _room(plan: OnnxPlan) -> int:
    """Bytes that must be free: for the output, for the merged weights that a graph is made from, and some."""
    merged = plan.graph is None and MODES[plan.mode].merges
    values = sum(element_count(tensor.shape) for tensor in plan.merge.tensors)
    return plan.nbytes + (4 * values if merged else 0) + (64 << 20)


_Unfinished = tuple[Path, OpenGraph | None, list[str]]
"""A graph in the output's folder, the same opened if it must still be rewritten, its data files that are hard links."""


def _build(plan: OnnxPlan, folder: Path) -> _Unfinished:
    """Have the graph made in `folder`."""
    assert plan.precision is not None
    mode, work = MODES[plan.mode], folder / ".model"
    try:
        source = _model_folder(plan, work)
        begin(f"building the graph ({plan.runtime}, {plan.precision})")
        with trusting(plan.trust_remote_code):
            graph = BUILDERS[plan.runtime].build(source, folder, plan.precision, plan.device)
        for name in plan.companions:
            place = folder / name
            if (source / name).is_file() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, place)
    except FossilExportError as problem:  # the user knows the model by the base's path
        for path in (work.absolute(), work):
            problem.args = (str(problem).replace(str(path), str(plan.merge.base.location)),)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if mode.merges:
        return graph, None, []
    begin("placing the shards")
    return graph, open_graph(plan.merge, mode, graph), []


def _model_folder(plan: OnnxPlan, work: Path) -> Path:
    """The checkpoint the graph is made from: merged, or the base with whatever the adapter brought but updates."""
    assert plan.precision is not None
    merges = MODES[plan.mode].merges
    if merges:
        merge = settled(with_dtype(plan.merge, PRECISIONS[plan.precision].dtype))
    else:
        merge = without_updates(plan.merge)
        own = all(path.parent == merge.base.folder or "/" in name for name, path in merge.companions.items())
        # Of others transformers, in this process or the builder's, would load a pickle, or other weights.
        own &= is_plain(merge.base)
        if own and merge.config is None and all(tensor.action == "copy" for tensor in merge.tensors):
            assert merge.base.folder is not None
            return merge.base.folder
    begin("merging the weights" if merges else "writing the trained modules")
    work.mkdir()
    write_model(merge, FolderSink(work))
    if merge.config is None and merge.base.folder is not None:
        shutil.copyfile(merge.base.folder / "config.json", work / "config.json")
    return work


def _take(plan: OnnxPlan, folder: Path) -> _Unfinished:
    """Open the graph that is there, and bring its companions and, unless its weights are made anew, its data."""
    assert plan.graph is not None
    begin("placing the shards")
    opened = open_planned(plan)
    for name, content in companions(plan.merge, plan.graph).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    linked = [] if opened.mode.makes_weights(opened) else share_data(plan.graph, folder, plan.copy_data)
    return folder / plan.graph.name, opened, linked


def _rewrite(graph: OpenGraph, path: Path) -> None:
    """Put the trained tensors into an opened graph and write it to `path`."""
    from fossil_export.onnx._signature import mark
    from fossil_export.onnx.graph._edit import Editor

    editor = Editor(graph.model)
    repack = graph.mode.makes_weights(graph)
    mark(graph, editor, graph.mode.rewrite(graph, editor))
    editor.save(path, repack=repack)


def _write_adapter(adapter: Adapter, folder: Path, graph: Path) -> Path:
    """The file of the adapter beside a graph that swaps."""
    from fossil_export.onnx._adapter_file import ADAPTER, adapter_arrays, write_adapter
    from fossil_export.onnx._signature import read_signature

    _quiet(folder / "genai_config.json")
    signature = read_signature(graph)
    write_adapter(folder / ADAPTER, adapter_arrays(adapter, signature, graph), signature)
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


def _record(plan: OnnxPlan, folder: Path, name: str) -> None:
    record = provenance(plan.merge, {})
    record |= {
        "artifact": "onnx",
        "mode": plan.mode,
        "runtime": plan.runtime,
        "precision": plan.precision,
        "graph": name,
    }
    (folder / PROVENANCE).write_bytes(write_json(record))


def _of_links(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{listed(names)} is a hard link to the base's, which ONNX Runtime runs and onnx.load refuses, in both "
        "folders; --copy-data makes a file of its own",
    )


__all__ = ["OnnxResult", "export_onnx", "run_onnx"]
