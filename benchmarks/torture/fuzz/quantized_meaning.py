"""What quantized weights stand for: by the formats' own libraries if the environment has them, else by their formulas,
in float64, from what the formats' authors say. No code of fossil_export's is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torture.fuzz.subject import Unjudged

Tensors = dict[str, Any]
Dense = dict[str, tuple[Any, Any]]
"""By the weight's name: (value, the size of what it was summed up of), in float64."""
Meaning = Callable[[Tensors, Mapping[str, Any], Mapping[str, str]], tuple[Dense, set[str]]]
"""(tensors, settings, metadata) → the dense weights, and the tensors that they are made of."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def spread(grid: Any, rows: int, columns: int, shape: Any) -> Any:
    """One value of `grid` for each block of `rows` and `columns`; of `shape`."""
    found = grid.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    if found.shape != shape:
        raise Unjudged(f"scales {list(grid.shape)} for {list(shape)} in blocks of {rows} × {columns}")
    return found


def fields(words: Any, bits: int, count: int | None = None) -> Any:
    """Unsigned numbers of so many bits from each row of words of 32 bits, the lowest bits first."""
    import numpy as np
    import torch

    raw = np.ascontiguousarray(words.contiguous().view(torch.int32).numpy()).view(np.uint8)
    every = np.unpackbits(raw, axis=-1, bitorder="little")
    every = every[:, : every.shape[1] // bits * bits].reshape(len(every), -1, bits).astype(np.int64)
    return torch.from_numpy((every << np.arange(bits)).sum(-1))[:, :count]


def halves(packed: Any) -> Any:
    """e2m1 floats, two in a byte, the low half first."""
    import torch

    table = torch.tensor(E2M1, dtype=torch.float64)
    return torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(-2)


def part(tensors: Tensors, name: str) -> Any:
    if name not in tensors:
        raise Unjudged(f"no {name}")
    return tensors[name]


def plain(value: Any) -> tuple[Any, Any]:
    return value, value.abs()


def fp8(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    found, taken = {}, set()
    block = settings.get("weight_block_size", [128, 128])
    for name, codes in tensors.items():
        if "float8" not in str(codes.dtype) or codes.ndim != 2:
            continue
        scale = part(tensors, f"{name}_scale_inv")
        if str(scale.dtype) == "torch.uint8":  # exponents, as transformers takes them
            scale = 2.0 ** (scale.double() - 127)
        if scale.numel() == 1:
            if block is not None and "weight_block_size" in settings and list(scale.shape) != [1, 1]:
                raise Unjudged("one scale, and blocks in the config")
            factor = scale.double().reshape(())
        elif block is None:
            raise Unjudged("many scales, and no blocks in the config")
        else:
            factor = spread(scale, block[0], block[1], codes.shape)
        found[name] = plain(codes.double() * factor)
        taken |= {name, f"{name}_scale_inv"}
    return found, taken


def modelopt(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    found, taken = {}, set()
    for name in [one for one in tensors if one.endswith(".weight") and f"{one}_scale" in tensors]:
        codes, scale = tensors[name], tensors[f"{name}_scale"]
        taken |= {name, f"{name}_scale"}
        if f"{name}_scale_2" in tensors:
            overall = tensors[f"{name}_scale_2"].double().reshape(())
            value = halves(codes)
            found[name] = plain(
                value * spread(scale.double() * overall, 1, settings.get("group_size") or 16, value.shape)
            )
            taken.add(f"{name}_scale_2")
        elif scale.numel() == 1:
            found[name] = plain(codes.double() * scale.double().reshape(()))
        elif scale.numel() == len(codes):
            found[name] = plain(codes.double() * scale.double().reshape(-1, 1))
        else:
            raise Unjudged(f"scales {list(scale.shape)} of {list(codes.shape)}")
    return found, taken


def gptq(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    """GPTQModel: W[o, i] = (code[i, o] − zero[g[i], o] − 1) · scale[g[i], o]."""
    import torch

    found, taken = {}, set()
    bits, size = settings["bits"], settings["group_size"]
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for name in [one for one in tensors if one.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes = fields(tensors[name].T, bits)
        scales, zeros = part(tensors, f"{module}.scales"), fields(part(tensors, f"{module}.qzeros"), bits) + less
        width = codes.shape[1]
        order = tensors.get(f"{module}.g_idx")
        order = torch.arange(width) // (width if size == -1 else size) if order is None else order.long()
        if len(order) != width or order.min() < 0 or zeros.shape != scales.shape:
            raise Unjudged("groups that do not fit")
        value = (codes.double() - zeros.T[:, order]) * scales.double().T[:, order]
        found[f"{module}.weight"] = plain(value)
        taken |= {f"{module}{end}" for end in (".qweight", ".qzeros", ".scales", ".g_idx")}
    return found, taken


def awq(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    """AutoAWQ: eight outputs to a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    import torch

    def unpacked(words: Any) -> Any:
        inside = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        return fields(words, 4).reshape(len(words), -1, 8)[..., inside].reshape(len(words), -1)

    found, taken = {}, set()
    size = settings.get("group_size", settings.get("q_group_size"))
    for name in [one for one in tensors if one.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes, zeros = unpacked(tensors[name]), unpacked(part(tensors, f"{module}.qzeros"))
        scales = part(tensors, f"{module}.scales")
        order = torch.arange(len(codes)) // (len(codes) if size == -1 else size)
        found[f"{module}.weight"] = plain(((codes.double() - zeros[order]) * scales.double()[order]).T)
        taken |= {f"{module}{end}" for end in (".qweight", ".qzeros", ".scales", ".g_idx")}
    return found, taken


def mlx(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    found, taken = {}, set()
    for name in [one for one in tensors if one.endswith(".scales")]:
        module = name.removesuffix(".scales")
        own = settings.get(module)
        own = {**settings, **own} if isinstance(own, dict) else settings
        kind = "qbiases" if f"{module}.qbiases" in tensors else "biases"
        codes = fields(part(tensors, f"{module}.weight"), own["bits"])
        scales = spread(tensors[name], 1, own["group_size"], codes.shape)
        biases = spread(part(tensors, f"{module}.{kind}"), 1, own["group_size"], codes.shape)
        found[f"{module}.weight"] = codes * scales + biases, (codes * scales).abs() + biases.abs()
        taken |= {name, f"{module}.weight", f"{module}.{kind}"}
    return found, taken


def torchao(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    found, taken = {}, set()
    for name, text in metadata.items():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if not isinstance(entry, dict) or "_data" not in entry:
            continue
        module = name.rpartition(".")[0]
        own = {key: part(tensors, f"{module}._weight_{key}") for key in entry["_tensor_data_names"]}
        shape = own["qdata"].shape
        rows, columns = entry["_data"]["block_size"]
        grid = shape[0] // rows, shape[1] // columns
        scale = spread(own["scale"].reshape(grid), rows, columns, shape)
        zero = spread(own["zero_point"].reshape(grid), rows, columns, shape) if "zero_point" in own else 0.0
        value = own["qdata"].double()
        found[name] = (value - zero) * scale, (value.abs() + abs(zero)) * scale.abs()
        taken |= {f"{module}._weight_{key}" for key in own}
    return found, taken


def bitsandbytes(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    import bitsandbytes as bnb
    import torch

    found, taken = {}, set()
    for name in [one for one in tensors if ".quant_state." in one]:
        weight = name.partition(".quant_state.")[0]
        own = {one.removeprefix(f"{weight}."): value for one, value in tensors.items() if one.startswith(f"{weight}.")}
        codes, state = part(tensors, weight), bnb.functional.QuantState.from_dict(dict(own), "cpu")
        shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
        # Only the state's own parts, as Linear4bit loads them.
        with torch.compiler.set_stance("force_eager"):
            found[weight] = plain(bnb.functional.dequantize_4bit(codes, state).reshape(shape).double())
        taken |= {weight, *(f"{weight}.{one}" for one in own)}
    for name in [one for one in tensors if one.endswith(".SCB")]:
        weight = f"{name.removesuffix('.SCB')}.weight"
        value = bnb.functional.int8_vectorwise_dequant(part(tensors, weight), tensors[name]).double()
        found[weight] = plain(value)
        taken |= {name, weight, f"{weight}_format"}
    return found, taken


def compressed(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    import torch
    from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
    from compressed_tensors.quantization import QuantizationConfig  # type: ignore[import-untyped]
    from compressed_tensors.utils.match import is_match  # type: ignore[import-untyped]

    config = QuantizationConfig.model_validate(dict(settings))
    found, taken = {}, set()
    for name in [one for one in tensors if one.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        layer = torch.nn.Linear(1, 1)
        schemes = [
            one
            for one in config.config_groups.values()
            if is_match(module, layer, one.targets, [*config.ignore] if config.ignore else [])
        ]
        if len(schemes) != 1:
            raise Unjudged(f"{len(schemes)} groups have {module}")
        own = {
            one.removeprefix(f"{module}."): value
            for one, value in tensors.items()
            if one.startswith(f"{module}.weight")
        }
        form = schemes[0].format or config.format
        value = BaseCompressor.get_value_from_registry(form).decompress(dict(own), schemes[0])["weight"].double()
        zero = own.get("weight_zero_point")
        size = value.abs() if zero is None else value.abs() + 512 * own["weight_scale"].double().abs().max()
        found[f"{module}.weight"] = value, size
        taken |= {f"{module}.{one}" for one in own}
    return found, taken


def mxfp4(tensors: Tensors, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Dense, set[str]]:
    import torch

    found, taken = {}, set()
    for name in [one for one in tensors if one.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        scales = part(tensors, f"{stem}_scales")
        value = halves(tensors[name]) * torch.ldexp(torch.ones((), dtype=torch.float64), scales.long() - 127)[..., None]
        found[stem] = plain(value.flatten(-2).transpose(-1, -2))
        taken |= {name, f"{stem}_scales"}
    return found, taken
