"""`convert`: look the target up, check what it needs, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints.single_file import staged_file
from fossil_export.checkpoints.staging import check_destination, staged_folder
from fossil_export.converting.options import Options
from fossil_export.errors import CheckpointError, FossilExportError, OutputError
from fossil_export.merging.plan import find_base
from fossil_export.storage import expanded, fetch


@dataclass(frozen=True)
class Target:
    """A format: `write(adapter, path, options)` fills the folder or writes the file at `path`, and returns what there
    is to say of it ("warnings" among it are printed as such); `what` is for `--help`."""

    write: Callable[[Adapter, Path, Options], dict[str, Any]]
    folder: bool
    what: str
    reads_base: bool = True
    magic: bytes = b""
    """How its files begin (or go on after four bytes)."""


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
    "gguf-lora": Target(_gguf_lora, False, "a GGUF LoRA file, for llama.cpp and Ollama", magic=b"GGUF"),
    "miss": Target(_miss, True, "today's PEFT MISS folder, from Bone and RWKV files", reads_base=False),
    "onnx-adapter": Target(_onnx_adapter, False, "an adapter file for a swappable ONNX graph", magic=b"TORT"),
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

    def __repr__(self) -> str:
        return f"<Conversion to {self.to}: {self.output}, {self.nbytes:,} bytes in {self.seconds:.1f} s>"

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


def _refuse_inputs(path: Path, adapter: Adapter, options: Options) -> None:
    """Raise OutputError where the output is, or holds, something that is only read."""
    base = options.base.path if options.base is not None else options.base_name
    given = [base, options.base_config, options.graph]
    inputs = [*adapter.files, adapter.path, *(Path(name).expanduser() for name in given if name)]
    target = path.resolve()
    for source in inputs:
        place = source.resolve()
        if place.exists() and (target == place or target in place.parents):
            raise OutputError(f"{path}: is or holds {source}, which is only read; choose another --output")


def _check_old_file(path: Path, target: Target, overwrite: bool) -> None:
    """Raise OutputError unless the file at `path` may be replaced: it was asked for, and is one of the same format."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if not overwrite:
        raise OutputError(f"{path}: exists already; choose another --output or add --overwrite")
    with path.open("rb") as file:
        beginning = file.read(8)
    if not any(beginning[at : at + len(target.magic)] == target.magic for at in (0, 4)):
        raise OutputError(f"{path}: is no file of this format; --overwrite replaces only those, remove it yourself")


def _base(adapter: Adapter, to: str, base: str | Path | None, base_config: str | Path | None) -> Options:
    """The base of the conversion, found where it is read, and what the result will call it."""
    if not TARGETS[to].reads_base or base_config is not None:
        name, revision = (str(base), None) if base is not None else (adapter.base_model, adapter.base_revision)
        return Options(None, name, revision, base_config)
    if base is None and not adapter.base_model:
        raise CheckpointError(f"{adapter.path}: does not name its base model; name it with --base or --base-config")
    found = find_base(adapter, base)
    return Options(found, found.name, adapter.base_revision if found.is_path else found.revision)


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

    "lora" and "miss" make folders, "gguf-lora" and "onnx-adapter" files. `adapter` and `base` are paths or ids on the
    Hub; `base` (by default the one the adapter names) tells the layers' sizes, by its headers; `base_config` is
    enough where it tells them too. `graph` is the swappable ONNX folder that "onnx-adapter" is for. `rank` or
    `energy` ask for the nearest LoRA of a bat adapter. `outtype` is "f32", "f16" or "q8_0", for "gguf-lora". Raises
    a FossilExportError with one line that names the remedy; nothing is half-written.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise FossilExportError(f"target is {to!r}, expected {', '.join(TARGETS)}")
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    options = replace(_base(adapter, to, base, base_config), graph=graph, rank=rank, energy=energy, outtype=outtype)
    fetch(adapter.needed)
    path = expanded(output, OutputError).absolute()
    if TARGETS[to].folder:
        # A state dict may lie anywhere; PEFT's folder is only read.
        _refuse_inputs(path, adapter, options)
        check_destination(path, [adapter.path] if adapter.peft_type != "RWKV" else [], overwrite)
        needed = 4 * sum(file.stat().st_size for file in adapter.files)
        with staged_folder(path, needed, overwrite) as folder:
            try:
                details = TARGETS[to].write(adapter, folder, options)
                adapter.check()
            except OSError as problem:
                raise OutputError(
                    f"{output}: writing failed: {problem.strerror}; make room or choose another"
                ) from problem
    else:
        _refuse_inputs(path, adapter, options)
        if path.exists():
            _check_old_file(path, TARGETS[to], overwrite)
        if not path.parent.is_dir():
            raise OutputError(f"{output}: cannot be written: its folder does not exist; make it first")
        try:
            with staged_file(path, overwrite) as partial:
                details = TARGETS[to].write(adapter, partial, options)
                adapter.check()
        except FileExistsError as problem:
            raise OutputError(f"{output}: has come into being meanwhile; choose another --output") from problem
        except OSError as problem:
            raise OutputError(f"{output}: cannot be written: {problem.strerror}; choose another --output") from problem
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    notes = adapter.notes + (options.base.notes if options.base is not None else ())
    warnings = notes + tuple(details.pop("warnings", ()))
    return Conversion(path, to, size, time.perf_counter() - started, details, warnings)
