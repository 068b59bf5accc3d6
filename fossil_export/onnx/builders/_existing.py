"""A graph the user already has: its data files are shared, what makes its folder run comes along."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.checkpoints._companions import TOKENIZER_FILES
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import CheckpointError, OnnxError, listed
from fossil_export.merging._plan import MergePlan
from fossil_export.onnx._places import OpenGraph
from fossil_export.onnx._trained import is_the_bases
from fossil_export.onnx.graph._file import external_files, load_graph
from fossil_export.onnx.graph._weight import SAFETENSORS_NAME, stored
from fossil_export.storage import resolve

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

COMPANIONS = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)


def find_graph(given: str | Path) -> Path:
    """The graph's file: itself, or the one in a folder. Raises OnnxError."""
    path = resolve(given, OnnxError, "graph")
    if path.is_file():
        return path
    graphs = sorted(path.glob("*.onnx"))
    if (path / "model.onnx") in graphs:
        return path / "model.onnx"
    if len(graphs) != 1:
        names = ", ".join(graph.name for graph in graphs) or "none"
        raise OnnxError(f"{path}: holds no model.onnx and not exactly one other graph ({names}); name the file")
    return graphs[0]


def share_data(graph: Path, folder: Path, copy: bool = False) -> list[str]:
    """Put the external data files of `graph` into `folder` without a second copy on the disk.

    A clone where the file system knows clones, else a hard link, else (another disk, or `copy`) a copy. Returns
    the names of the files that are hard links: ONNX Runtime runs those, the onnx package refuses to load them.
    """
    linked = []
    files = list(external_files(load_graph(graph)))
    _check_links(graph, [file.relative_to(graph.parent).as_posix() for file in files])
    for file in files:
        target = folder / file.relative_to(graph.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(file, target)
        elif not _clone(file, target):
            try:
                os.link(file.resolve(), target)
                linked.append(file.name)
            except OSError:
                shutil.copyfile(file, target)
    return linked


def _clone(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source` until one is written to (FICLONE); False where that is unknown."""
    ficlone = 0x40049409
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), ficlone, old.fileno())
            return True
        except OSError:
            target.unlink()
            return False


def refuse_libraries(folder: Path) -> None:
    """Raise OnnxError where the folder's genai_config.json names a shared library: GenAI would load and run it; and
    where it is no config."""
    path = folder / "genai_config.json"
    config = read_json(path, OnnxError) if path.is_file() else {}
    if not isinstance(model := config.get("model", {}), dict):
        raise OnnxError(f"{path}: model is {model!r}, not a JSON object; mend it, or take the file out")
    if found := next(_libraries(config), None):
        raise OnnxError(f"{path}: {found}, a library that GenAI would load and run; take it out")


def _libraries(value: Any) -> Iterator[str]:
    """What in a config of GenAI names a library: `custom_ops_library`, or an option of an execution provider."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, (dict, list)):
            yield from _libraries(entry)
        elif isinstance(entry, str) and entry:
            named = isinstance(key, str) and ("library" in key or "lib_path" in key or key == "backend_path")
            if named or re.search(r"\.(so|dll|dylib)(\.|$)", entry):
                yield f"{key} is {entry}"


def companions(merge: MergePlan, graph: Path) -> dict[str, Path | bytes]:
    """What makes the folder of `graph` run, by name: tokenizer and configs that lie beside it or, if they do not, the
    base's; the adapter's tokenizer goes before both. Raises OnnxError for a config that names a library, and for links
    out of the folder."""
    refuse_libraries(graph.parent)
    own = merge.adapter.tokenizer()
    without = TOKENIZER_FILES if own else ()
    names = [name for name in COMPANIONS if name not in without and (graph.parent / name).is_file()]
    _check_links(graph, names)
    found: dict[str, Path | bytes] = {name: graph.parent / name for name in names}
    for name, path in {**merge.companions, **own}.items():
        if name in COMPANIONS:
            found.setdefault(name, path)
    if merge.config is not None:
        found.setdefault("config.json", merge.config)
    elif merge.base.folder is not None and merge.base.config is not None:
        found.setdefault("config.json", merge.base.folder / "config.json")
    return found


def _check_links(graph: Path, names: Sequence[str]) -> None:
    try:
        LocalFolder(graph.parent).check_links(names)
    except CheckpointError as problem:
        raise OnnxError(str(problem)) from problem


def check_saved(graph: OpenGraph) -> None:
    """Raise OnnxError unless every whole tensor that the adapter brought stands in the graph already, or is the
    base's."""
    missing = []
    for tensor in graph.merge.tensors:
        for info in tensor.brought:
            values = np.asarray(graph.adapter.array(info), np.float32)
            if not any(_holds(value, values) for value in graph.model.graph.initializers.values()):
                missing += [] if is_the_bases(graph.merge, tensor) else [tensor.name]
    if missing:
        raise OnnxError(
            f"{graph.path}: the adapter also trained {listed(missing)} whole, and the graph has the base's; export it "
            "from a model with those in place, or let --runtime make it"
        )


def _holds(value: Any, wanted: Array) -> bool:
    """Whether an initializer is the tensor `wanted`, or its transpose, rounded to the initializer's dtype."""
    tensor = value.const_value
    if tensor is None or tensor.dtype.name not in SAFETENSORS_NAME:
        return False
    shape = tuple(int(size) for size in tensor.shape)
    rounded = wanted.astype(numpy_dtype(SAFETENSORS_NAME[tensor.dtype.name]))
    found = stored(tensor) if shape in (wanted.shape, wanted.shape[::-1]) else None
    return found is not None and (np.array_equal(found, rounded) or np.array_equal(found, rounded.T))
