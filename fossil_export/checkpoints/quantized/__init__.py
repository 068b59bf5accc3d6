"""Formats of quantized weights: one file per format, one entry in `FORMATS`."""

from __future__ import annotations

from fossil_export.checkpoints.quantized._compressed_tensors import CompressedTensors
from fossil_export.checkpoints.quantized._format import Format, Stored, coded, settings_of
from fossil_export.checkpoints.quantized._fp8 import Fp8
from fossil_export.checkpoints.quantized._modelopt import ModelOpt

FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors(), "fp8": Fp8(), "modelopt": ModelOpt()}
"""Asked in this order: the first that describes a checkpoint has it."""

__all__ = ["FORMATS", "Format", "Stored", "coded", "settings_of"]
