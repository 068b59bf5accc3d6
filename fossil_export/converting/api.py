"""`convert`: look the target up, check what it needs, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints.staging import check_destination, staged_folder
from fossil_export.converting.options import Options
from fossil_export.errors import FossilExportError, OutputError
from fossil_export.hub import expanded


@dataclass(frozen=True)
class Target:
    """A format: `write(adapter, path, options)` fills the folder or writes the file at `path`, and returns what there
    is to say of it ("warnings" among it are printed as such); `what` is for `--help`."""

    write: Callable[[Adapter, Path, Options], dict[str, Any]]
    folder: bool
    what: str


def _lora(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    from fossil_export.converting.lora import write

    return write(adapter, output, options)


def _gguf_lora(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    from fossil_export.converting.gguf_lora import write

    return write(adapter, output, options)


def _miss(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    from fossil_export.converting.miss import write

    return write(adapter, output, options)


def _onnx_adapter(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    from fossil_export.converting.onnx_adapter import write

    return write(adapter, output, options)


TARGETS = {
    "lora": Target(_lora, True, "a PEFT LoRA folder, for PEFT, vLLM, SGLang"),
    "gguf-lora": Target(_gguf_lora, False, "a GGUF LoRA file, for llama.cpp and Ollama"),
    "miss": Target(_miss, True, "today's PEFT MISS folder, from Bone and RWKV files"),
    "onnx-adapter": Target(_onnx_adapter, False, "an adapter file for a swappable ONNX graph"),
}
"""What an adapter can be turned into. A new format is one file and one entry here."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion; `details` are what the target has to say of it."""

    output: Path
    to: str
    nbytes: int
    seconds: float
    details: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "output": str(self.output),
            "to": self.to,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            **self.details,
            "warnings": list(self.warnings),
        }


def convert(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    base_config: str | Path | None = None,
    graph: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    outtype: str = "f32",
    overwrite: bool = False,
) -> Conversion:
    """Write `adapter` as another format at `output`; `to` is one of `TARGETS`.

    "lora" and "miss" make folders, "gguf-lora" and "onnx-adapter" files. `base` (by default the one the adapter
    names) tells the layers' sizes, by its headers; `base_config` is enough where it tells them too. `graph` is
    the swappable ONNX folder that "onnx-adapter" is for. `rank` or `energy` ask for the nearest LoRA of a bat
    adapter. `outtype` is "f32", "f16" or "q8_0", for "gguf-lora". Raises a FossilExportError with one line that
    names the remedy; nothing is half-written.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise FossilExportError(f"target is {to!r}, expected {', '.join(TARGETS)}")
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    options = Options(base, base_config, graph, rank, energy, outtype)
    path = expanded(output, OutputError).absolute()
    if TARGETS[to].folder:
        # A state dict may lie anywhere; PEFT's folder is only read.
        check_destination(path, [adapter.path] if adapter.peft_type != "RWKV" else [], overwrite)
        needed = 4 * sum(file.stat().st_size for file in adapter.files)
        with staged_folder(path, needed, overwrite) as folder:
            try:
                details = TARGETS[to].write(adapter, folder, options)
            except OSError as problem:
                raise OutputError(
                    f"{output}: writing failed: {problem.strerror}; make room or choose another"
                ) from problem
    else:
        if path.exists() and not overwrite:
            raise OutputError(f"{output}: exists already; choose another --output or add --overwrite")
        if not path.parent.is_dir():
            raise OutputError(f"{output}: cannot be written: its folder does not exist; make it first")
        details = TARGETS[to].write(adapter, path, options)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    warnings = tuple(details.pop("warnings", ()))
    return Conversion(path, to, size, time.perf_counter() - started, details, warnings)
