"""What converters may ask for beyond adapter and output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fossil_export.storage import Origin, parse_name


@dataclass(frozen=True)
class Options:
    """`base` is where the base lies, None if `base_config`, its config.json alone, must do or the converter asks for
    neither; `base_name` and `base_revision` are what the result says of it. `graph` is the ONNX graph an adapter file
    is made for; `rank` and `energy` ask for the nearest LoRA; `outtype` is the number format of a
    GGUF file."""

    base: Origin | None = None
    base_name: str | None = None
    base_revision: str | None = None
    base_config: str | Path | None = None
    graph: str | Path | None = None
    rank: int | None = None
    energy: float | None = None
    outtype: str = "f32"

    @property
    def base_id(self) -> str | None:
        """What PEFT loads the base by: the repository, for one on the Hub."""
        found = parse_name(self.base_name)
        return self.base_name if found is None else found.id

    @property
    def base_folder(self) -> str | None:
        """The folder of the base within its repository, of which PEFT knows nothing."""
        found = parse_name(self.base_name)
        return None if found is None else found.folder
