"""What the adapters have in common that PEFT loads from a folder."""

from __future__ import annotations

from pathlib import Path

from fossil_export.adapters._files import WEIGHTS
from fossil_export.artifacts._kind import ADAPTER_CONFIG, Look

PATTERNS = (ADAPTER_CONFIG, *WEIGHTS)

MODEL = frozenset(
    {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
)
"""Files of a whole model. Beside an adapter, loaders take a repository's model for that of the adapter's base."""

CLASH = "holds a whole model, which loaders would not find any more beside an adapter"


def is_adapter(look: Look, peft_types: tuple[str, ...]) -> bool:
    """Whether it is an adapter of one of these types, with its weights."""
    return look.peft_type in peft_types and look.has(*WEIGHTS)


def parts(folder: Path, names: tuple[str, ...], wanted: set[str]) -> set[str]:
    """PEFT reads the safetensors file if there are both."""
    safe, pickled = WEIGHTS
    return wanted - {pickled} if safe in wanted else wanted


def replaces(name: str) -> bool:
    """Whether PEFT may load this file of an earlier adapter."""
    return name in WEIGHTS
