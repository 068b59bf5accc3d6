"""Formats of quantized weights: one file per format, one entry in `FORMATS`."""

from __future__ import annotations

from fossil_export.checkpoints.quantized._bnb import BitsAndBytes
from fossil_export.checkpoints.quantized._format import Format, Stored, coded, settings_of
from fossil_export.checkpoints.quantized._fp8 import BlockFp8

FORMATS: dict[str, Format] = {"bitsandbytes": BitsAndBytes(), "fp8": BlockFp8()}
"""Asked in this order: the first that describes a checkpoint has it."""

__all__ = ["FORMATS", "Format", "Stored", "coded", "settings_of"]
