"""What bitsandbytes says of a weight in 4 bits: the JSON in `X.weight.quant_state.bitsandbytes__nf4`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import Stored

KINDS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST = 1 << 16
"""Bytes that such a text may have."""

_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class NestedState:
    """Of scales that are quantized: `block` of them share a scale, and `offset` was taken off all."""

    block: int
    offset: float


@dataclass(frozen=True)
class QuantState:
    """A weight of `shape`, quantized from `dtype` to the levels of `kind` in blocks of `block` elements."""

    kind: str
    block: int
    dtype: str
    shape: tuple[int, ...]
    nested: NestedState | None
    text: str
    """The JSON itself."""


def parse_state(stored: Stored, info: TensorInfo) -> QuantState:
    """Read one. Raises CheckpointError, naming the tensor."""

    def wrong(what: str) -> Exception:
        return stored.error(info, f"{what}; fetch the base again")

    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > LARGEST:
        raise wrong(f"is {info.dtype}, and must be JSON as U8")
    try:
        text = bytes(stored.values(info)).decode()
        found = json.loads(text)
    except ValueError as problem:
        raise wrong(f"is not valid JSON ({problem})") from problem
    keys = set(found) if isinstance(found, Mapping) else set()
    if odd := sorted(_KEYS - keys) or sorted(keys - _KEYS - _NESTED):
        raise wrong(f"has other keys than bitsandbytes writes ({', '.join(odd)})")
    kind, block, shape = found["quant_type"], found["blocksize"], found["shape"]
    if kind not in KINDS or not info.name.endswith(f"__{kind}"):
        raise wrong(f"has quant_type {kind!r}")
    if type(block) is not int or block not in BLOCKS:
        raise wrong(f"has blocksize {block!r}, not one of {', '.join(map(str, BLOCKS))}")
    dtype = BY_TORCH_NAME.get(found["dtype"]) if isinstance(found["dtype"], str) else None
    if dtype not in ("BF16", "F16", "F32"):
        raise wrong(f"has dtype {found['dtype']!r}, not bfloat16, float16 or float32")
    if not isinstance(shape, list) or not shape or not all(type(one) is int and one > 0 for one in shape):
        raise wrong(f"has shape {shape!r}")
    return QuantState(kind, block, dtype, tuple(shape), _nested(found, keys, wrong), text)


def _nested(found: Mapping[str, Any], keys: set[str], wrong: Any) -> NestedState | None:
    if not keys & _NESTED:
        return None
    if not keys >= _NESTED:
        raise wrong(f"has no {', '.join(sorted(_NESTED - keys))}")
    block, dtype, offset = found["nested_blocksize"], found["nested_dtype"], found["nested_offset"]
    if type(block) is not int or block <= 0:
        raise wrong(f"has nested_blocksize {block!r}")
    if dtype != "float32":
        raise wrong(f"has nested_dtype {dtype!r}, not float32")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise wrong(f"has nested_offset {offset!r}")
    return NestedState(block, float(offset))


def with_offset(state: QuantState, offset: float, room: int) -> bytes | None:
    """The JSON with another nested offset (a float32), in `room` bytes; None if it has too many."""
    import numpy as np

    found: dict[str, Any] = json.loads(state.text)
    # As Python writes it; in the digits that tell it from other float32; and without spaces.
    short = float(str(np.float32(offset)))
    for number, separators in ((offset, None), (short, None), (short, (",", ":"))):
        data = json.dumps(found | {"nested_offset": number}, separators=separators).encode()
        if len(data) <= room:
            return data.ljust(room)
    return None
