"""bitsandbytes: checkpoints that transformers saved of models loaded in 4 or 8 bits.

4 bits (`QuantState.as_dict(packed=True)` in bitsandbytes/functional.py): beside `X.weight`, whose bytes are codes in a
column of whatever dtype, lie `X.weight.absmax` (a scale for each block of the weight in its own order), `.quant_map`
and `.quant_state.bitsandbytes__nf4` (or fp4), JSON of the weight's shape, dtype and block size; with double
quantization also `.nested_absmax` and `.nested_quant_map`, of the scales that are codes then.

8 bits (`Linear8bitLt` in bitsandbytes/nn/modules.py): `X.weight` (out, in) int8, `X.SCB` (out) and `X.weight_format`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fossil_export.checkpoints._coding import Coding
from fossil_export.checkpoints._dtypes import BITS, element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import is_conv1d
from fossil_export.checkpoints.quantized._bnb_codes import FourBitCodes, NestedScales, RowsOfInt8, Turned
from fossil_export.checkpoints.quantized._bnb_state import QuantState, parse_state
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype

STATE = ".quant_state.bitsandbytes__"
SCALES = ".SCB"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STORAGE = ("U8", "I8", "F16", "BF16", "F32", "F64")
REMEDY = "fetch the base again"


class BitsAndBytes(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if (settings := stored.settings) is not None:
            named = stored.method == "bitsandbytes"  # older configs name no method
            return named or (
                stored.method is None and any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
            )
        return any(STATE in name or name.endswith(SCALES) for name in stored.tensors)

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        settings = stored.settings or {}
        four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
        if four and eight:
            raise stored.error("quantization_config", "has load_in_4bit and load_in_8bit; keep the one that is true")
        states: dict[str, str] = {}
        scales: list[str] = []
        for name in stored.tensors:
            if STATE in name:
                weight = name.partition(STATE)[0]
                if weight in states:
                    raise stored.error(name, f"is there beside {states[weight]}; {REMEDY}")
                states[weight] = name
            elif name.endswith(SCALES):
                scales.append(name)
        if settings and not (states or scales) and not settings.get("llm_int8_has_fp16_weight"):
            bits = "load_in_4bit" if four else "load_in_8bit"
            wanted = f"{STATE}nf4" if four else SCALES
            raise stored.error(
                next(iter(stored.tensors)),
                f"and all other tensors are not quantized (no {wanted}), but config.json has "
                f"{bits}; take quantization_config out of it if the weights are plain",
            )
        _check_orphans(stored, states)
        for weight, state in states.items():
            if eight:
                raise stored.error(state, "is of a weight in 4 bits, but config.json has load_in_8bit; mend it")
            yield _four_bits(stored, weight, stored.tensors[state], settings)
        dtype = float_dtype(stored.config, "F16")
        for name in scales:
            if four:
                raise stored.error(name, "is of a weight in 8 bits, but config.json has load_in_4bit; mend it")
            yield _eight_bits(stored, name, dtype)


def _check_orphans(stored: Stored, states: Mapping[str, str]) -> None:
    """Raise CheckpointError for a part of a quantized weight whose other parts are missing."""
    for name, info in stored.tensors.items():
        for part in PARTS:
            if name.endswith(part) and name.removesuffix(part) not in states:
                raise stored.error(info, f"has no {name.removesuffix(part)}{STATE}nf4 or fp4 beside it; {REMEDY}")
        owner, _, part = name.partition(".weight.")
        if part and f"{owner}.weight" in states and f".{part}" not in PARTS and name != states[f"{owner}.weight"]:
            raise stored.error(info, f"is no part of a weight in 4 bits, as {owner}.weight is; {REMEDY}")
        if not name.endswith("weight"):
            continue
        if info.dtype == "U8" and name not in states:
            raise stored.error(info, f"has no {name}{STATE}nf4 or fp4 beside it; {REMEDY}")
        if info.dtype == "I8" and name not in states and name.removesuffix(".weight") + SCALES not in stored.tensors:
            raise stored.error(info, f"has no {name.removesuffix('.weight')}{SCALES} beside it; {REMEDY}")


def _part(stored: Stored, weight: str, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> TensorInfo:
    """A tensor that belongs to a weight; raises CheckpointError if it is missing, or another one."""
    info = stored.tensors.get(name)
    if info is None:
        raise stored.error(weight, f"has no {name} beside it; {REMEDY}")
    if info.dtype not in dtypes or info.shape != shape:
        raise stored.error(
            info, f"is {info.dtype}, and must be {' or '.join(dtypes)} {list(shape)} for {weight}; {REMEDY}"
        )
    return info


def _four_bits(stored: Stored, weight: str, state_info: TensorInfo, settings: Mapping[str, Any]) -> TensorInfo:
    state = parse_state(stored, state_info)
    _check_state(stored, state_info, state, settings)
    codes = stored.tensors.get(weight)
    if codes is None:
        raise stored.error(state_info, f"has no {weight} beside it; {REMEDY}")
    count = element_count(state.shape)
    nbytes = -(-count // 2)
    if codes.dtype not in STORAGE or codes.nbytes != nbytes or codes.shape != (nbytes * 8 // BITS[codes.dtype], 1):
        raise stored.error(
            codes, f"is {codes.dtype}, and must be a column of {nbytes:,} bytes, for {list(state.shape)}; {REMEDY}"
        )
    blocks = -(-count // state.block)
    levels = _part(stored, weight, f"{weight}.quant_map", ("F32",), (16,))
    if state.nested is None:
        scales = _part(stored, weight, f"{weight}.absmax", ("F32",), (blocks,))
        for extra in (f"{weight}.nested_absmax", f"{weight}.nested_quant_map"):
            if extra in stored.tensors:
                raise stored.error(
                    extra, f"is of scales that are quantized, which {state_info.name} does not say; {REMEDY}"
                )
        coding: Coding = FourBitCodes(codes, scales, levels, state_info, state)
    else:
        scales = _part(stored, weight, f"{weight}.absmax", ("U8",), (blocks,))
        outer = _part(stored, weight, f"{weight}.nested_absmax", ("F32",), (-(-blocks // state.nested.block),))
        table = _part(stored, weight, f"{weight}.nested_quant_map", ("F32",), (256,))
        coding = FourBitCodes(codes, scales, levels, state_info, state, NestedScales(outer, table))
    return _plain(stored, weight, state.dtype, state.shape, coding)


def _check_state(stored: Stored, info: TensorInfo, state: QuantState, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json says something else of a weight than what lies beside it."""
    kind = settings.get("bnb_4bit_quant_type", state.kind)
    if kind != state.kind:
        raise stored.error(info, f"is of {state.kind}, but config.json has bnb_4bit_quant_type {kind!r}; mend it")
    nested = settings.get("bnb_4bit_use_double_quant", state.nested is not None)
    if nested is not (state.nested is not None):
        has = "has" if state.nested is not None else "has no"
        raise stored.error(
            info, f"{has} quantized scales, but config.json has bnb_4bit_use_double_quant {nested}; mend it"
        )


def _eight_bits(stored: Stored, name: str, dtype: str) -> TensorInfo:
    module = name.removesuffix(SCALES)
    weight = f"{module}.weight"
    codes = stored.tensors.get(weight)
    if codes is None:
        raise stored.error(name, f"has no {weight} beside it; {REMEDY}")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise stored.error(codes, f"is {codes.dtype}, and no matrix of int8, but has {name} beside it; {REMEDY}")
    scales = _part(stored, weight, name, ("F32",), codes.shape[:1])
    form = stored.tensors.get(f"{module}.weight_format")
    if form is not None:
        value = stored.values(form).reshape(-1)
        if form.dtype != "U8" or len(value) != 1 or value[0] != 0:
            raise stored.error(
                form,
                f"is {value.tolist()}: {weight} is in an order of a GPU's (col32, turing, ampere), which is not "
                "read; load the model with the bitsandbytes that made it, and save it with one of today",
            )
    return _plain(stored, weight, dtype, codes.shape, RowsOfInt8(codes, scales, form, dtype))


def _plain(stored: Stored, name: str, dtype: str, shape: tuple[int, ...], coding: Coding) -> TensorInfo:
    """The weight as its class has it: one of a Conv1D was turned before it was quantized."""
    if len(shape) == 2 and is_conv1d(name, stored.config):
        return coded(name, dtype, (shape[1], shape[0]), Turned(coding, shape[0], dtype))
    return coded(name, dtype, shape, coding)
