"""An ONNX graph with its data, configs and adapter files."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.artifacts._kind import Kind, Look

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact

_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x1f])")
# How a graph (ONNX, as protobuf has it) names a file of data beside it: key "location", and the length of the value.


def _recognised(look: Look) -> bool:
    is_merged = look.has("*.safetensors") and (look.record or {}).get("artifact") == "merged"
    return look.has("*.onnx") and not is_merged


def _parts(folder: Path, names: tuple[str, ...], wanted: set[str]) -> set[str]:
    graphs = [name for name in names if name.endswith(".onnx") and name in wanted]
    return wanted.union(*(_data(folder, graph) for graph in graphs))


def _data(folder: Path, graph: str) -> Iterator[str]:
    """The files beside a graph that it names as holding its weights."""
    with (folder / graph).open("rb") as file:
        if (folder / graph).stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for found in _LOCATION.finditer(content):
                low, *high = found[1]
                length = (low & 127) + (high[0] << 7 if high else 0)
                name = content[found.end() : found.end() + length].decode(errors="replace")
                yield name.removeprefix("./")


def _opened(folder: Path) -> Artifact:
    from fossil_export.onnx.builders._existing import refuse_libraries
    from fossil_export.verifying._onnx_folder import OnnxFolder

    refuse_libraries(folder)
    return OnnxFolder(folder)


KIND = Kind(
    name="onnx",
    title="ONNX model",
    recognised=_recognised,
    opened=_opened,
    patterns=("*.onnx", "*.onnx.data", "*.onnx_data*", "*.onnx_adapter", "genai_config.json"),
    parts=_parts,
    whole=True,
)
