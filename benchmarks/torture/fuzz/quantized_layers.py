"""Linear layers of random codes and scales in each quantized format, and what configs say of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Tensors = dict[str, Any]
Linear = Callable[[int, int, Any], Tensors]
"""(rows, columns, generator) → the tensors of a linear layer, by the ends of their names."""


def _random(generator: Any, shape: Any, dtype: Any = None) -> Any:
    import torch

    found = torch.randn(shape, generator=generator) * 0.05
    return found if dtype is None else found.to(dtype)


def _whole(generator: Any, low: int, high: int, shape: Any) -> Any:
    import torch

    return torch.randint(low, high, shape, generator=generator)


def _words(codes: Any, bits: int) -> Any:
    """Codes (n, m) as rows of words of 32 bits (n, m · bits / 32), the lowest bits first."""
    import numpy as np
    import torch

    every = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(every.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


def _scales(generator: Any, shape: Any, dtype: Any) -> Any:
    return (_random(generator, shape).abs() + 0.01).to(dtype)


def fp8(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = (_random(generator, (rows, columns)) * 1000).to(torch.float8_e4m3fn)
    grid = _scales(generator, (-(-rows // 32), -(-columns // 32)), torch.float32)
    return {".weight": codes, ".weight_scale_inv": grid * 0.01}


def modelopt(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = _whole(generator, 0, 256, (rows, columns // 2)).to(torch.uint8)
    scales = (_scales(generator, (rows, columns // 16), torch.float32) * 1000).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales, ".weight_scale_2": torch.tensor(0.0003)}


def modelopt8(rows: int, columns: int, generator: Any) -> Tensors:
    own = fp8(rows, columns, generator)
    return {".weight": own[".weight"], ".weight_scale": own[".weight_scale_inv"].flatten()[0]}


def gptq(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".qweight": _words(_whole(generator, 0, 16, (rows, columns)), 4).T,
        ".qzeros": _words(_whole(generator, 0, 15, (groups, rows)), 4),
        ".scales": _scales(generator, (groups, rows), torch.float16),
        ".g_idx": (torch.arange(columns) // 32).int(),
    }


def awq(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".qweight": _words(_whole(generator, 0, 16, (columns, rows)), 4),
        ".qzeros": _words(_whole(generator, 0, 16, (groups, rows)), 4),
        ".scales": _scales(generator, (groups, rows), torch.float16),
    }


def mlx(biases: str) -> Linear:
    def made(rows: int, columns: int, generator: Any) -> Tensors:
        import torch

        groups = columns // 32
        return {
            ".weight": _words(_whole(generator, 0, 16, (rows, columns)), 4).view(torch.uint32),
            ".scales": _scales(generator, (rows, groups), torch.bfloat16),
            biases: _random(generator, (rows, groups), torch.bfloat16),
        }

    return made


def torchao(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    return {
        "._weight_qdata": _whole(generator, -8, 8, (rows, columns)).to(torch.int8),
        "._weight_scale": _scales(generator, (rows, columns // 32), torch.bfloat16),
        "._weight_zero_point": _whole(generator, -8, 8, (rows, columns // 32)).to(torch.int8),
    }


def torchao8(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    return {
        "._weight_qdata": fp8(rows, columns, generator)[".weight"],
        "._weight_scale": _scales(generator, (rows, columns // 32), torch.float32),
    }


def _of_dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


TORCHAO: dict[str, Any] = {
    "torchao, integers": {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": _of_dtype("int4"),
            "block_size": [1, 32],
            "dtype": _of_dtype("bfloat16"),
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    },
    "torchao, float8": {
        "_type": "Float8Tensor",
        "_data": {
            "block_size": [1, 32],
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": _of_dtype("bfloat16"),
        },
        "_tensor_data_names": ["qdata", "scale"],
    },
}


def four_bits(kind: str, nested: bool) -> Linear:
    def made(rows: int, columns: int, generator: Any) -> Tensors:
        import bitsandbytes as bnb
        import torch

        value = _random(generator, (rows, columns), torch.bfloat16)
        codes, state = bnb.functional.quantize_4bit(value, quant_type=kind, compress_statistics=nested)
        return {".weight": codes} | {f".weight.{key}": one for key, one in state.as_dict(packed=True).items()}

    return made


def eight_bits(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    scales = _scales(generator, (rows,), torch.float32)
    codes = _whole(generator, -127, 128, (rows, columns)).to(torch.int8)
    return {".weight": codes, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}


def packed(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".weight_packed": _words(_whole(generator, 0, 16, (rows, columns)), 4),
        ".weight_scale": _scales(generator, (rows, groups), torch.bfloat16),
        ".weight_zero_point": _words(_whole(generator, 0, 16, (groups, rows)), 4).T,
        ".weight_shape": torch.tensor([rows, columns]),
    }


def channels(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    own = eight_bits(rows, columns, generator)
    return {".weight": own[".weight"], ".weight_scale": own[".SCB"].reshape(-1, 1).to(torch.bfloat16)}


def nvfp4(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    own = modelopt(rows, columns, generator)
    overall = torch.tensor([3000.0])
    return {".weight_packed": own[".weight"], ".weight_scale": own[".weight_scale"], ".weight_global_scale": overall}


def mxfp4(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = _whole(generator, 0, 256, (2, rows, columns // 32, 16)).to(torch.uint8)
    return {"_blocks": codes, "_scales": _whole(generator, 117, 123, (2, rows, columns // 32)).to(torch.uint8)}


def said(form: str, **weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def bnb(kind: str, nested: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
    }


PACKED = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
