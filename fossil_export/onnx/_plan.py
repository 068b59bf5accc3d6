"""What an ONNX export will do, decided before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._extras import Need, has, need, require
from fossil_export._foreign import newer_note
from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export._spellings import chosen, device_named, expected
from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._stamp import Stamp, check_stamp, stamps_of
from fossil_export.errors import OnnxError, listed
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge, settled
from fossil_export.onnx._places import OpenGraph, Place, open_graph
from fossil_export.onnx._refusals import check_mode, check_products
from fossil_export.onnx.builders import BUILDERS, PRECISIONS, PrecisionName, RuntimeName, default_builder
from fossil_export.onnx.builders._existing import check_saved, companions, find_graph
from fossil_export.onnx.graph._file import external_files, load_graph
from fossil_export.onnx.modes import MODES, Mode, ModeName

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class OnnxPlan:
    """What an ONNX export will do, as `plan_onnx` decides it.

    Attributes:
        mode: "merged", "tiled", "fused" or "swappable".
        runtime: Who makes the graph; "onnx" for one that is there already.
        precision: Of the graph that is made, None for one that is there.
        device: What it is for.
        graph: The graph that is used, None if one is made.
        copy_data: Whether its data file is copied, not shared.
        merge: The `MergePlan` behind it.
        places: The weights of the graph that get trained tensors; None if there is no graph yet, or no base here to
            find them by.
        companions: Names of the files that come along; a builder may write more.
        nbytes: About the size of what is written; shared data is not.
        trust_remote_code: Whether the builder may run the code in the model's folder.
        stamps: Of the graph that is used and of what comes along with it.
    """

    mode: str
    runtime: str
    precision: str | None
    device: str
    graph: Path | None
    copy_data: bool
    merge: MergePlan
    places: tuple[Place, ...] | None
    companions: tuple[str, ...]
    nbytes: int
    trust_remote_code: bool = False
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        where = f"in {self.graph}" if self.graph is not None else f"in a graph by {self.runtime}, {self.precision}"
        count = f"{len(self.places)} weights" if self.places is not None else f"{self.merge.count('merge')} modules"
        name = self.merge.adapter.name
        return line("OnnxPlan", f"of {name}: {count} {self.mode} {where}, about {self.nbytes:,} bytes")

    def _repr_html_(self) -> str:
        rows = [
            ("adapter", self.merge.adapter.name),
            ("base", self.merge.base_name),
            ("graph", self.graph or f"made by {self.runtime}, {self.precision}"),
            ("mode", self.mode),
            ("device", self.device),
            ("weights", len(self.places) if self.places is not None else None),
            ("modules", self.merge.count("merge")),
            ("size", f"about {readable_bytes(self.nbytes)}"),
        ]
        return table("Plan of an ONNX export", rows, self.warnings)

    def check(self) -> None:
        """Raise CheckpointError or OnnxError where a file that the plan was made from is another one by now."""
        self.merge.check()
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp, OnnxError)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know."""
        folder = self.merge.base.folder
        newer = newer_note(folder) if folder is not None and self.graph is None and has("transformers") else ()
        return (*self.merge.warnings, *newer, *_warnings(self.merge, MODES[self.mode]))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON shows it: the trained modules, and their places if there is a graph to find them in."""
        merge = self.merge.to_dict()
        return {
            "adapter": merge["adapter"],
            "base": merge["base"],
            "mode": self.mode,
            "runtime": self.runtime,
            "precision": self.precision,
            "device": self.device,
            "graph": None if self.graph is None else str(self.graph),
            "modules": [
                {"module": module, "tensor": tensor.name, "shape": list(tensor.shape)}
                for module, tensor in self.merge.modules.items()
            ],
            "places": None if self.places is None else [place.to_dict() for place in self.places],
            "whole_tensors": _whole(self.merge),
            "companions": list(self.companions),
            "bytes": self.nbytes,
            "warnings": list(self.warnings),
        }


@reporting
def plan_onnx(
    adapter: Adapter | str | Path,
    base: str | Path | None = None,
    *,
    mode: ModeName = "merged",
    runtime: RuntimeName | None = None,
    precision: PrecisionName | None = None,
    onnx: str | Path | None = None,
    copy_data: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Shown = False,
) -> OnnxPlan:
    """Decide how the trained model becomes an ONNX folder; nothing is written and no graph is made.

    Of adapter and base only headers and configs are read, but for the places in `onnx`, which are found by the base's
    values, if it is on this machine.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder").
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
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        OnnxPlan: `mode`, `runtime`, `precision`, `graph` (None if one is made), `places` (the graph's weights that get
            trained tensors, if they can be known), `nbytes` (about), `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        OnnxError: What stops the export, as far as it can be seen from there.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.

    Example:
        >>> import fossil_export
        >>> fossil_export.plan_onnx("my-adapter", mode="fused")  # doctest: +SKIP
    """
    plan = decide(adapter, base, mode, runtime, precision, onnx, copy_data, device, trust_remote_code)
    if plan.graph is None or not _is_here(plan.merge):
        return plan
    begin("placing the shards")
    graph = open_planned(replace(plan, merge=settled(plan.merge)))
    shared = not copy_data and not graph.mode.makes_weights(graph)
    return replace(plan, places=graph.places, nbytes=_size_with(graph.path, graph.adapter, shared))


def of_graph(mode: str) -> Need:
    """What working on a graph that is there needs."""
    return need("onnx", "onnx", "onnx_ir", *(["onnxruntime"] if MODES[mode].swaps else []))


def check_packages(plan: OnnxPlan) -> None:
    """Raise MissingExtraError, which names all that is missing, unless what running the plan takes is installed."""
    if plan.graph is None:
        require(f"--runtime {plan.runtime}", BUILDERS[plan.runtime].needs)
    else:
        require("working on ONNX graphs", of_graph(plan.mode))


def decide(
    adapter: Adapter | str | Path,
    base: str | Path | None,
    mode: str,
    runtime: str | None,
    precision: str | None,
    onnx: str | Path | None,
    copy_data: bool,
    device: str,
    trust_remote_code: bool = False,
) -> OnnxPlan:
    """The plan as far as it is known without the base's weights: without `places`."""
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    if precision is not None:
        if (found := chosen(precision, PRECISIONS)) is None:
            raise OnnxError(f"precision is {str(precision)!r}, {expected(PRECISIONS)}")
        precision = found
    check_mode(adapter, mode, precision)
    if runtime is not None and runtime not in BUILDERS:
        raise OnnxError(f"runtime is {runtime!r}, expected {', '.join(BUILDERS)}")
    device = device_named(device, OnnxError)  # of another one a builder would quietly make a graph for the CPU
    if onnx is not None and (runtime or precision):
        raise OnnxError("--onnx takes the graph as it is; leave --runtime and --precision out")
    if onnx is not None:
        check_products(adapter)
        require("working on ONNX graphs", of_graph(mode))
    merge = plan_merge(adapter, base, dtype="auto", into="original")
    stamps: dict[Path, Stamp] = {}
    if onnx is not None:
        graph: Path | None = find_graph(onnx)
        assert graph is not None
        beside = companions(merge, graph)
        stamps = stamps_of([graph, *(path for path in beside.values() if isinstance(path, Path))])
        stamps |= stamps_of(external_files(load_graph(graph)), linked=True)
        runtime, files = "onnx", tuple(beside)
        # Shared weights take no room; if they must be copied after all, a full disk is an error of its own.
        nbytes = _size_with(graph, adapter, not copy_data and not MODES[mode].new_weights)
    else:
        if merge.base.folder is None or merge.base.config is None:
            raise OnnxError(f"{merge.base.location}: has no config.json, from which a graph is made; name the folder")
        graph, files = None, tuple(dict.fromkeys([*merge.companions, "config.json"]))
        runtime, precision = runtime or _default_runtime(merge), precision or "fp32"
        values = sum(element_count(tensor.shape) for tensor in merge.tensors)
        nbytes = values * PRECISIONS[precision].nbytes + (0 if MODES[mode].merges else 4 * adapter.parameters)
    return OnnxPlan(
        mode,
        runtime,
        precision,
        device,
        graph,
        copy_data,
        merge,
        None,
        files,
        nbytes,
        trust_remote_code,
        stamps,
    )


def open_planned(plan: OnnxPlan) -> OpenGraph:
    """The graph that the plan uses, opened to be rewritten. Raises OnnxError for what stops that."""
    assert plan.graph is not None
    graph = open_graph(plan.merge, MODES[plan.mode], plan.graph)
    if plan.places is not None and graph.places != plan.places:
        raise OnnxError(f"{plan.graph}: is another graph than the one that the plan was made for; plan again")
    check_saved(graph)
    return graph


def _is_here(merge: MergePlan) -> bool:
    """Whether all weights are on this machine."""
    return merge.adapter.is_here and all(header.path.is_file() for header in merge.base.files)


def _default_runtime(merge: MergePlan) -> str:
    names = (merge.base.config or {}).get("architectures") or []
    return default_builder([str(name) for name in merge.config_edits.get("architectures") or names]).name


def _size_with(graph: Path, adapter: Adapter, shared: bool) -> int:
    """Bytes that are written for a graph that is there: its own, without its data if that is `shared`, and D."""
    files = [path for path in graph.parent.glob(f"{graph.name}*") if path.is_file()]
    return sum(path.stat().st_size for path in ([graph] if shared else files)) + 4 * adapter.parameters


def _whole(merge: MergePlan) -> list[str]:
    return [tensor.name for tensor in merge.tensors if tensor.brought]


def _warnings(merge: MergePlan, mode: Mode) -> Iterator[str]:
    # Beside what a module got, PEFT saves its weight as it was.
    whole = [tensor.name for tensor in merge.tensors if tensor.brought and tensor.action != "merge"]
    if mode.swaps and whole:
        yield f"{listed(whole)} were trained whole: they stay in the graph whatever adapter is active"


__all__ = ["OnnxPlan", "plan_onnx"]
