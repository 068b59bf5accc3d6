"""What targets may ask for beyond adapter and output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """`base` is the model's folder or file (default: the one the adapter names), `base_config` its config.json alone;
    `graph` the ONNX graph an adapter file is made for; `rank` and `energy` ask for an approximate LoRA of a bat
    adapter; `outtype` is the number format of a GGUF file."""

    base: str | Path | None = None
    base_config: str | Path | None = None
    graph: str | Path | None = None
    rank: int | None = None
    energy: float | None = None
    outtype: str = "f32"
