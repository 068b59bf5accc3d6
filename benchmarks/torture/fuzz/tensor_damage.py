"""Damage to tensors: their values, shapes, dtypes and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1.0, 1e-30, 65504.0, 3e38, -3e38)
WHOLE = (0, 1, -1, 7, 15, 16, 127, -128, 255, 2**31 - 1, -(2**31), 2**40)
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64"),
)


def damage_tensors(path: Path, random: Random, wanted: Callable[[str], bool]) -> str:
    """Change one tensor of a safetensors file whose name is `wanted`."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    how = damaged(tensors, random.choice(sorted(filter(wanted, tensors))), random)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return how


def damaged(tensors: dict[str, Any], name: str, random: Random) -> str:
    """Change the tensor `name` of `tensors` in place, and say how."""
    import torch

    value = tensors[name]
    way = random.choice(("values", "values", "values", "shape", "shape", "dtype", "gone", "name", "other"))
    if way == "values":
        tensors[name], how = _values(value, random)
    elif way == "shape":
        tensors[name], how = _shape(value, random)
    elif way == "dtype":
        kind = random.choice(DTYPES)
        dtype = getattr(torch, kind)
        seen = random.random() < 0.5 and value.ndim and value.shape[-1] * value.element_size() % dtype.itemsize == 0
        tensors[name] = value.contiguous().view(dtype) if seen else value.double().to(dtype)
        how = f"is {'seen as' if seen else ''} {kind}"
    elif way == "gone":
        del tensors[name]
        how = "is gone"
    elif way == "name":
        other = random.choice((f"{name}x", f"x.{name}", name.replace(".0.", ".1."), name.rpartition(".")[0], name[1:]))
        tensors[other] = tensors.pop(name) if random.random() < 0.7 else value.clone()
        how = f"is called {other}"
    else:
        other = random.choice(sorted(tensors))
        tensors[name] = tensors[other].clone()
        how = f"is {other}"
    return f"{name} {how}"


def _values(value: Any, random: Random) -> tuple[Any, str]:
    import torch

    found = value.clone().flatten()
    if not found.numel():
        return value, "is empty as before"
    start = random.randrange(found.numel())
    stop = random.choice((start + 1, start + 1, start + 8, found.numel()))
    start = 0 if stop == found.numel() and random.random() < 0.5 else start
    own = found[start:stop].double()
    if value.is_floating_point() and random.random() < 0.4:
        factor = random.choice((-1.0, 0.5, 2.0, 1e-6, 1e6))
        own, how = own * factor, f"times {factor}"
    elif value.is_floating_point():
        odd = random.choice(FLOATS)
        own, how = torch.full_like(own, odd), str(odd)
    else:
        number = random.choice((*WHOLE, random.randrange(256)))
        own, how = torch.full((len(own),), number, dtype=torch.int64), str(number)
        if not value.is_complex() and value.dtype != torch.bool:
            bits = 8 * value.element_size()
            own = own if bits == 64 else own & ((1 << bits) - 1)
            if value.dtype.is_signed and bits < 64:
                own = own - ((own >> bits - 1) << bits)
    found[start:stop] = own.to(value.dtype)
    return found.reshape(value.shape), f"has {how} from {start} to {stop}"


def _shape(value: Any, random: Random) -> tuple[Any, str]:
    import torch

    axis = random.randrange(max(1, value.ndim))
    way = random.choice(("turned", "flat", "axis", "column", "short", "long", "none", "single", "two"))
    if way == "turned" and value.ndim > 1:
        found = value.transpose(-1, -2)
    elif way == "column":
        found = value.reshape(-1, 1)
    elif way == "axis":
        found = value[None]
    elif way == "short" and value.ndim:
        found = value.narrow(axis, 0, value.shape[axis] - 1)
    elif way == "long" and value.ndim and value.shape[axis]:
        found = torch.cat([value, value.narrow(axis, 0, 1)], axis)
    elif way == "none" and value.ndim:
        found = value.narrow(axis, 0, 0)
    elif way == "single" and value.numel():
        found = value.flatten()[0]
    elif way == "two" and value.numel() % 2 == 0:
        found = value.reshape(2, -1)
    else:
        found = value.flatten()
    return found.clone(), f"is {list(found.shape)}"
