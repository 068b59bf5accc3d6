"""Quantizations that are recognised and not read: what they are called, and how their floats are had elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fossil_export.checkpoints.quantized._format import settings_of

_BY_TRANSFORMERS = "load it with transformers, call model.dequantize()"
_BY_WEIGHT = "load it with transformers, put what {} gives in its place"


@dataclass(frozen=True)
class Unread:
    """A quantization by its `name`. `how` its floats are had, if its library tells; `hidden` says that weights which
    are stored as floats may be quantized too, when the model runs."""

    name: str
    how: str = ""
    hidden: bool = False

    @property
    def reason(self) -> str:
        """What to say of a weight that cannot be changed, from "the base is quantized" on."""
        way = (
            f"{self.how}, save that model without its quantization_config, and merge into it"
            if self.how
            else "run the adapter beside it, with PEFT"
        )
        return (
            f"the base is quantized with {self.name}, which is not read here; {way} (the model before its quantization "
            "is another one than an adapter for this was trained on)"
        )


METHODS: dict[str, Unread] = {
    "aqlm": Unread("AQLM"),
    "auto-round": Unread("AutoRound", "export it again with auto_round, in the format auto_gptq, or fake (floats)"),
    "autoround": Unread("AutoRound", "export it again with auto_round, in the format auto_gptq, or fake (floats)"),
    "awq": Unread("AWQ in this form"),
    "bitnet": Unread("BitNet", hidden=True),
    "bitsandbytes": Unread("bitsandbytes in this form", _BY_TRANSFORMERS),
    "compressed-tensors": Unread("compressed-tensors in this form", _BY_TRANSFORMERS),
    "eetq": Unread("EETQ"),
    "exl2": Unread("ExLlamaV2"),
    "exl3": Unread("ExLlamaV3"),
    "fbgemm_fp8": Unread("FBGEMM fp8"),
    "fouroversix": Unread("Four Over Six", hidden=True),
    "fp8": Unread("fp8 in this form", _BY_TRANSFORMERS),
    "fp_quant": Unread("FP-Quant", hidden=True),
    "gemma": Unread("Gemma's own integers", hidden=True),
    "gptq": Unread("GPTQ in this form"),
    "higgs": Unread("HIGGS", _BY_TRANSFORMERS),
    "hqq": Unread("HQQ", _BY_WEIGHT.format("HQQLinear.dequantize() of each layer")),
    "metal": Unread("MLX's affine codes, for Metal", _BY_TRANSFORMERS),
    "modelopt": Unread("NVIDIA ModelOpt"),
    "mxfp8": Unread("mxfp8", _BY_TRANSFORMERS),
    "nvfp4": Unread("nvfp4"),
    "quanto": Unread("Quanto", _BY_WEIGHT.format("dequantize() of each weight")),
    "quark": Unread("Quark", hidden=True),
    "sinq": Unread("SINQ", hidden=True),
    "spqr": Unread("SpQR"),
    "torchao": Unread("torchao in this form", _BY_WEIGHT.format("dequantize() of each weight")),
    "vptq": Unread("VPTQ"),
}  # fmt: skip
"""By the `quant_method` of a config."""

SIGNS = {
    "W_q": "hqq",
    "codebooks": "aqlm",
    "weight._data": "quanto",
    "weight_scales": "eetq",
    "qweight": "gptq",
    "weight_packed": "compressed-tensors",
    "weight_scale_2": "modelopt",
    "absmax": "bitsandbytes",
    "centroids": "vptq",
    "trellis": "exl3",
}
"""How the name of a tensor ends, in a checkpoint without a config."""


def unread(config: Mapping[str, Any] | None, names: Iterable[str] = ()) -> Unread | None:
    """How a checkpoint is quantized that no format has described; None if nothing says that it is.

    Without settings in its config the names of its tensors tell.
    """
    settings = settings_of(config)
    if settings is not None:
        method = settings.get("quant_method")
        if isinstance(method, str) and method.lower() in METHODS:
            return METHODS[method.lower()]
        if method is None and isinstance(settings.get("quant_algo"), str):
            return Unread(f"NVIDIA ModelOpt ({settings['quant_algo']})")
        called = (
            f"the unknown method {method!r}" if method is not None else "a method that its config.json does not name"
        )
        return Unread(called, hidden=True)
    for name in names:
        for sign, method in SIGNS.items():
            if name.endswith(f".{sign}"):
                return METHODS[method]
    return None
