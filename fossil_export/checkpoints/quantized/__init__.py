"""Formats of quantized weights: one file per format, one entry in `FORMATS`."""

from __future__ import annotations

from fossil_export.checkpoints.quantized._awq import Awq
from fossil_export.checkpoints.quantized._bnb import BitsAndBytes
from fossil_export.checkpoints.quantized._compressed_tensors import CompressedTensors
from fossil_export.checkpoints.quantized._format import Format, Stored, coded, settings_of
from fossil_export.checkpoints.quantized._fp8 import Fp8
from fossil_export.checkpoints.quantized._gptq import Gptq
from fossil_export.checkpoints.quantized._mlx import Metal, Mlx
from fossil_export.checkpoints.quantized._modelopt import ModelOpt
from fossil_export.checkpoints.quantized._mxfp4 import Mxfp4Format
from fossil_export.checkpoints.quantized._torchao import TorchAo
from fossil_export.checkpoints.quantized._unread import Unread, unread

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "bitsandbytes": BitsAndBytes(),
    "fp8": Fp8(),
    "modelopt": ModelOpt(),
    "mxfp4": Mxfp4Format(),
    "torchao": TorchAo(),
    "awq": Awq(),
    "gptq": Gptq(),
    "mlx": Mlx(),
    "metal": Metal(),
}
"""Asked in this order: the first that describes a checkpoint has it."""

__all__ = ["FORMATS", "Format", "Stored", "Unread", "coded", "settings_of", "unread"]
