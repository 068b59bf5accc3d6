"""`convert`: look the target up, check what it needs, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.converting import onnx_adapter
from fossil_export.errors import FossilExportError, OutputError
from fossil_export.hub import expanded

Target = Callable[[Adapter, Path, "Options"], dict[str, Any]]

TARGETS: dict[str, Target] = {"onnx-adapter": onnx_adapter.write}
"""What an adapter can be turned into: the name of the format and the function that writes it and says what it wrote."""


@dataclass(frozen=True)
class Options:
    """What targets may ask for beyond adapter and output: the base, and the graph an adapter file is made for."""

    base: str | Path | None = None
    graph: str | Path | None = None


@dataclass(frozen=True)
class Conversion:
    """A finished conversion; `details` are what the target has to say of it."""

    output: Path
    to: str
    nbytes: int
    seconds: float
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "output": str(self.output),
            "to": self.to,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            **self.details,
        }


def convert(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    graph: str | Path | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write `adapter` as another format at `output`; `to` is one of `TARGETS`.

    "onnx-adapter" is an ONNX Runtime adapter file for `graph`, a folder or file that `export_onnx` wrote in mode
    "swappable"; it is checked against the graph's signature and the weights of `base` (by default the one the
    adapter names). Raises a FossilExportError with one line that names the remedy; nothing is half-written.
    """
    started = time.perf_counter()
    if to not in TARGETS:
        raise FossilExportError(f"target is {to!r}, expected {', '.join(TARGETS)}")
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    target = expanded(output, OutputError).absolute()
    if target.exists() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another --output or add --overwrite")
    if not target.parent.is_dir():
        raise OutputError(f"{output}: cannot be written: its folder does not exist; make it first")
    details = TARGETS[to](adapter, target, Options(base, graph))
    size = target.stat().st_size
    return Conversion(target, to, size, time.perf_counter() - started, details)
