"""The table of converters. It is light: the commands take their choices and their help from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fossil_export._extras import Need, need

if TYPE_CHECKING:
    from fossil_export.adapters import Adapter
    from fossil_export.converting._options import Options

Write = Callable[["Adapter", Path, "Options"], dict[str, Any]]

Format = Literal["lora", "gguf-lora", "miss", "onnx-adapter"]
Outtype = Literal["f32", "f16", "q8_0"]

OPTIONS = {
    "base_config": "--base-config",
    "graph": "--for",
    "rank": "--rank",
    "energy": "--energy",
    "outtype": "--outtype",
}
"""Arguments of `convert` that only some converters take, and the command's names for them."""

OUTTYPES: dict[str, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
"""Number formats: the name of gguf's GGMLQuantizationType in small letters, and of its LlamaFileType."""


def _in(module: str) -> Write:
    """`write` of a module of this room, imported on first use."""

    def write(adapter: Adapter, path: Path, options: Options) -> dict[str, Any]:
        details: dict[str, Any] = import_module(f"fossil_export.converting._{module}").write(adapter, path, options)
        return details

    return write


@dataclass(frozen=True)
class Converter:
    """A format: `write(adapter, path, options)` fills the folder or writes the file at `path`, and returns what there
    is to say of it ("warnings" among it are printed as such). `what` is for `--help`, `takes` are names of `OPTIONS`,
    `magic` is how its files begin (or go on after four bytes); `needs` are the packages that it takes."""

    name: Format
    what: str
    write: Write
    folder: bool
    takes: tuple[str, ...] = ()
    reads_base: bool = True
    magic: bytes = b""
    needs: tuple[Need, ...] = ()


_LORA, _MISS = "a PEFT LoRA folder, for PEFT, vLLM, SGLang", "today's PEFT MISS folder, from Bone and RWKV files"
_GGUF, _ONNX = "a GGUF LoRA file, for llama.cpp and Ollama", "an adapter file for a swappable ONNX graph"

_OF_GGUF, _OF_ONNX = (need("gguf"),), (need("onnx"),)

CONVERTERS: dict[str, Converter] = {
    converter.name: converter
    for converter in (
        Converter("lora", _LORA, _in("lora"), folder=True, takes=("base_config", "rank", "energy")),
        Converter(
            "gguf-lora", _GGUF, _in("gguf_lora"), False, ("base_config", "outtype"), magic=b"GGUF", needs=_OF_GGUF
        ),
        Converter("miss", _MISS, _in("miss"), folder=True, reads_base=False),
        Converter("onnx-adapter", _ONNX, _in("onnx_adapter"), False, ("graph",), magic=b"TORT", needs=_OF_ONNX),
    )
}
"""What an adapter can be turned into. A new format is one file beside this one and one line here."""


def takers(option: str) -> str:
    """The converters that take an option of `OPTIONS`, for its help and for the one who gave it to another one."""
    return ", ".join(name for name, converter in CONVERTERS.items() if option in converter.takes)
