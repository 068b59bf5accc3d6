"""Formats of quantized weights: one file per format, one entry in `FORMATS`."""

from __future__ import annotations

from fossil_export.checkpoints.quantized._awq import Awq
from fossil_export.checkpoints.quantized._format import Format, Stored, coded, settings_of
from fossil_export.checkpoints.quantized._fp8 import BlockFp8
from fossil_export.checkpoints.quantized._gptq import Gptq

FORMATS: dict[str, Format] = {"fp8": BlockFp8(), "awq": Awq(), "gptq": Gptq()}
"""Asked in this order: the first that describes a checkpoint has it."""

__all__ = ["FORMATS", "Format", "Stored", "coded", "settings_of"]
