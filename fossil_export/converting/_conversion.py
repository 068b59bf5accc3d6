"""`convert`: look the converter up, check what it needs, write."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export._spellings import chosen, expected
from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints._stamp import check_stamp, stamps_of
from fossil_export.converting._converters import CONVERTERS, OPTIONS, OUTTYPES, Converter, Format, Outtype, takers
from fossil_export.converting._options import Options
from fossil_export.errors import (
    AdapterError,
    CheckpointError,
    FossilExportError,
    OutputError,
    failed,
    listed,
    unreadable,
)
from fossil_export.merging._planning import find_base
from fossil_export.methods import ROWS
from fossil_export.storage import fetch, is_path, resolve
from fossil_export.writing._place import local_output
from fossil_export.writing._single_file import staged_file
from fossil_export.writing._staging import check_destination, staged_folder


@dataclass(frozen=True)
class Conversion:
    """A finished conversion, as `convert` returns it.

    Attributes:
        output: Folder or file that was written.
        to: The format.
        nbytes: Size in bytes of what was written.
        seconds: Wall time.
        details: What the format has to say: ranks, dtype, errors.
        warnings: Lines that the user should see.
    """

    output: Path
    to: str
    nbytes: int
    seconds: float
    details: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return line("Conversion", f"to {self.to}: {self.output}, {self.nbytes:,} bytes in {self.seconds:.1f} s")

    def _repr_html_(self) -> str:
        simple = [
            (name.replace("_", " "), value)
            for name, value in self.details.items()
            if isinstance(value, (str, int, float))
        ]
        rows = [("written", self.output), ("format", self.to), ("size", readable_bytes(self.nbytes)), *simple]
        return table("Converted", [*rows, ("time", f"{self.seconds:.1f} s")], self.warnings)

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
    inputs = [*adapter.files, adapter.path]
    for name in given:
        with suppress(RuntimeError, ValueError):  # what need not be a path
            if name and is_path(str(found := Path(name).expanduser())):
                inputs.append(found)
    target = Path(os.path.realpath(path))  # of links in a circle too
    for source in inputs:
        place = Path(os.path.realpath(source))
        if place.exists() and (target == place or target in place.parents):
            raise OutputError(f"{path}: is or holds {source}, which is only read; choose another --output")


def _check_old_file(path: Path, converter: Converter, overwrite: bool) -> None:
    """Raise OutputError unless the file at `path` may be replaced: it was asked for, and is one of the same format."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if not overwrite:
        raise OutputError(f"{path}: exists already; choose another --output or add --overwrite")
    if not path.is_file():  # to read a pipe would be to wait
        raise OutputError(f"{path}: is a broken link or no regular file; choose another --output or remove it")
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
    except OSError as problem:
        raise OutputError(unreadable(path, problem)) from problem
    if not any(beginning[at : at + len(converter.magic)] == converter.magic for at in (0, 4)):
        raise OutputError(f"{path}: is no file of this format; --overwrite replaces only those, remove it yourself")


def _refuse_options(converter: Converter, given: dict[str, Any]) -> None:
    """Raise FossilExportError for an option that is for other converters."""
    strange = [name for name, value in given.items() if value is not None and name not in converter.takes]
    if strange:
        raise FossilExportError(
            f"--to {converter.name} takes no {OPTIONS[strange[0]]}, which is for {takers(strange[0])}; leave it out"
        )


def _base(adapter: Adapter, converter: Converter, base: str | Path | None, base_config: str | Path | None) -> Options:
    """The base of the conversion, found if it is read, and what the result will call it."""
    if not converter.reads_base or base_config is not None:
        name, revision = (str(base), None) if base is not None else (adapter.base_shown, adapter.base_revision)
        return Options(None, name, revision, base_config)
    if base is None and not adapter.base_model:
        raise CheckpointError(f"{adapter.path}: does not name its base model; name it with --base or --base-config")
    found = find_base(adapter, base)
    return Options(found, found.name, adapter.base_revision if found.is_path else found.revision)


@reporting
def convert(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    to: Format,
    base: str | Path | None = None,
    base_config: str | Path | None = None,
    graph: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    outtype: Outtype | None = None,
    overwrite: bool = False,
    progress: Shown = False,
) -> Conversion:
    """Write an adapter in another format; the model itself is not loaded.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder").
        output: Folder or file to write. It must not exist, unless `overwrite`.
        to: "lora" (a LoRA folder of PEFT), "miss" (a folder), "gguf-lora" (a file for llama.cpp) or "onnx-adapter" (a
            file for a swappable ONNX folder).
        base: The base model: a folder, an address or an id on the Hub. Default: the one that the adapter names. Only
            its headers are read, for the nearest LoRA also weights, if the update depends on them.
        base_config: For "lora" and "gguf-lora": the base's config.json, if the model itself is not here.
        graph: For "onnx-adapter": the swappable ONNX folder that it is for.
        rank: For "lora": the nearest LoRA of this rank, of an adapter that is none or is a larger one.
        energy: The same, of the rank that keeps this share of the update, between 0 and 1; not with `rank`.
        outtype: For "gguf-lora": "f32" (default), "f16" or "q8_0".
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        Conversion: `output`, `to`, `nbytes`, `seconds`, `details` (what the format has to say: ranks, errors),
            `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line with the remedy, also for an option that `to` does not take; nothing is
            half-written.
        AdapterError: The adapter cannot be that.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> fossil_export.convert("my-adapter", "my-lora", to="lora")  # doctest: +SKIP
    """
    started = time.perf_counter()
    if to not in CONVERTERS:
        raise FossilExportError(f"target is {to!r}, expected {', '.join(CONVERTERS)}")
    converter = CONVERTERS[to]
    special = {"base_config": base_config, "graph": graph, "rank": rank, "energy": energy, "outtype": outtype}
    _refuse_options(converter, special)
    if outtype is not None:
        if (meant := chosen(outtype, OUTTYPES)) is None:
            raise FossilExportError(f"outtype is {str(outtype)!r}, {expected(OUTTYPES)}")
        outtype = meant  # type: ignore[assignment]  # one of the table
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    if placed := [one for one in adapter.trained.values() if one.method in ("lora_parameter", *ROWS)]:
        raise AdapterError(
            f"{adapter.path}: has {placed[0].method} modules ({listed([one.module for one in placed])}), which {to} "
            "has no place for; merge it, and go on with the merged model"
        )
    found = _base(adapter, converter, base, base_config)
    options = replace(found, graph=graph, rank=rank, energy=energy, outtype=outtype or found.outtype)
    fetch(adapter.needed)
    described = [] if base_config is None else [resolve(base_config, CheckpointError, "base config")]
    beside = stamps_of([*adapter.tokenizer().values(), *described])

    def check() -> None:
        adapter.check()
        for file, stamp in beside.items():
            check_stamp(file, stamp, AdapterError)

    path = local_output(output)
    begin(f"converting to {to}")
    if converter.folder:
        # A state dict may lie anywhere; PEFT's folder is only read.
        _refuse_inputs(path, adapter, options)
        check_destination(path, [adapter.path] if adapter.peft_type != "RWKV" else [], overwrite)
        needed = 4 * sum(file.stat().st_size for file in adapter.files)
        with staged_folder(path, needed, overwrite) as folder:
            try:
                details = converter.write(adapter, folder, options)
                check()
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            except OSError as problem:
                check()  # an input that is gone is no fault of the output's
                raise OutputError(failed(path, problem, folder)) from problem
    else:
        _refuse_inputs(path, adapter, options)
        if os.path.lexists(path):
            _check_old_file(path, converter, overwrite)
        if not path.parent.is_dir():
            raise OutputError(f"{output}: cannot be written: its folder does not exist; make it first")
        try:
            with staged_file(path, overwrite) as partial:
                details = converter.write(adapter, partial, options)
                check()
                size = partial.stat().st_size
        except FileExistsError as problem:
            raise OutputError(f"{output}: has come into being meanwhile; choose another --output") from problem
        except OSError as problem:
            check()
            raise OutputError(failed(path, problem, path.parent)) from problem
    notes = adapter.notes + (options.base.notes if options.base is not None else ())
    warnings = notes + tuple(details.pop("warnings", ()))
    return Conversion(path, to, size, time.perf_counter() - started, details, warnings)
