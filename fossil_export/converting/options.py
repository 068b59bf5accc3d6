"""What targets may ask for beyond adapter and output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fossil_export.hub import Located


@dataclass(frozen=True)
class Options:
    """`base` is where the base lies, None where `base_config`, its config.json alone, is to do or the target asks for
    neither; `base_name` and `base_revision` are what the result says of it. `graph` is the ONNX graph an adapter file
    is made for; `rank` and `energy` ask for an approximate LoRA of a bat adapter; `outtype` is the number format of a
    GGUF file."""

    base: Located | None = None
    base_name: str | None = None
    base_revision: str | None = None
    base_config: str | Path | None = None
    graph: str | Path | None = None
    rank: int | None = None
    energy: float | None = None
    outtype: str = "f32"
