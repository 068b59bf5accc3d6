"""Checkpoints of compressed-tensors (llm-compressor): each module in the form that its group of the config names.

`READERS` has the forms. Those here are codes times scales (`_scaled`): fp8 and int8 in `X.weight` with
`X.weight_scale`, by tensor, channel, group or block, with `X.weight_zero_point` if they are not symmetric; and fp4, two
in a byte of `X.weight_packed`, in groups whose scales are fp8 (NVFP4, with one divisor for all of them,
`X.weight_global_scale`) or powers of two (MXFP4). Products are rounded to the scales' dtype, and then to the model's.
Source: `_dequantize` in compressed_tensors/quantization/lifecycle/forward_helpers.py, and compressors/ beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from fossil_export._patterns import PatternError
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._compressed import METHOD, UNDER, Group, Weights, compressed
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype
from fossil_export.checkpoints.quantized._packed import read_packed
from fossil_export.checkpoints.quantized._scaled import FP8, Scaled

OWN = (
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_global_scale",
    ".weight_shape",
    ".weight_g_idx",
)
"""How the names of what a weight is stored in end."""
PASSED = tuple(
    f".{what}_{part}" for what in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point", "global_scale")
)
"""How the names of what is known of activations and caches end."""

Reader = Callable[[Stored, str, TensorInfo, Group], TensorInfo]
"""The weight of a module as floats: (checkpoint, module, its codes, its group) → a tensor with a coding."""


class CompressedTensors(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        return stored.method == METHOD

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        config = compressed(stored)
        taken: set[str] = set()
        for name, codes in stored.tensors.items():
            module, _, last = name.rpartition(".")
            if last != "weight_packed" and (last != "weight" or codes.dtype not in (*FP8, "I8")):
                continue
            try:
                group = config.group_of(module)
            except PatternError as problem:
                raise stored.error(UNDER, f"has a pattern that {problem}") from problem
            if group is None or group.weights is None:
                raise stored.error(codes, f"is quantized, but {UNDER} has no weights of it; fetch both again")
            reader = READERS.get(group.format)
            if reader is None:
                raise stored.error(codes, f"is stored as {group.format!r} ({METHOD}), which is not read")
            found = reader(stored, module, codes, group)
            assert found.coding is not None
            taken.update(info.name for info in found.coding.stored)
            yield found
        for name, info in stored.tensors.items():
            if name.endswith(OWN) and name not in taken:
                raise stored.error(info, _left_over(stored, name))
        if not taken and any(group.weights is not None for group in config.groups):
            raise stored.error(UNDER, "says that weights are quantized, and none is; take it out of config.json")

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        return info.name.endswith(PASSED)


def _left_over(stored: Stored, name: str) -> str:
    weight = stored.tensors.get(name.rpartition(".")[0] + ".weight")
    if weight is None:
        return "belongs to a weight that is not there; fetch the base again"
    if weight.dtype in FP8 or weight.dtype == "I8":
        return f"has no meaning for the form of {weight.name}; fetch the base again"
    return (
        f"has {weight.name} as {weight.dtype} beside it: floats that the model rounds as it runs, not codes; save the "
        "model compressed, or take the base that was quantized"
    )


def _plain(stored: Stored, module: str, codes: TensorInfo, group: Group) -> TensorInfo:
    """One code in each element of `X.weight`."""
    args = _args(group)
    wanted = "F8_E4M3" if args.kind == "float" else "I8"
    if codes.dtype != wanted or (args.kind == "float" and args.bits != 8):
        raise stored.error(codes, f"is {codes.dtype}, but {UNDER} says {args.bits} bits, {args.kind}; fetch both again")
    scales, dtype = _scales(stored, module, codes), float_dtype(stored.config)
    if scales.dtype not in (("U8",) if group.format == "mxfp8-quantized" else ("F32", "BF16", "F16")):
        raise stored.error(scales, f"is {scales.dtype}, which no scale of {group.format} is; fetch it again")
    outputs, width = _sizes(stored, codes)
    block = _block(stored, codes, args, outputs, width)
    style = "powers" if scales.dtype == "U8" else "span"
    found = Scaled(
        *(codes, scales, block, dtype, outputs),
        between=_between(scales),
        style=style,
        bits=args.bits,
        symmetric=args.symmetric,
    )
    _check_grid(stored, scales, found, args)
    zeros = stored.tensors.get(f"{module}.weight_zero_point")
    if zeros is not None:  # symmetric ones may have them too: they are taken as the library takes them
        if zeros.dtype not in ("I8", "F8_E4M3", "F32", "BF16", "F16") or zeros.shape != scales.shape:
            raise stored.error(zeros, f"is {zeros.dtype}, and must be {list(scales.shape)} whole numbers of 8 bits")
        found = replace(found, zeros=zeros)
    elif not args.symmetric:
        raise stored.error(codes, f"has no {module}.weight_zero_point beside it; fetch that file again")
    return coded(f"{module}.weight", dtype, codes.shape, found)


def _fp4(stored: Stored, module: str, codes: TensorInfo, group: Group) -> TensorInfo:
    """Two codes in each byte of `X.weight_packed`."""
    args = _args(group)
    if (args.bits, args.kind, args.symmetric) != (4, "float", True) or args.group is None or codes.dtype != "U8":
        raise stored.error(codes, f"is {codes.dtype}, but {UNDER} says {args.bits} bits, {args.kind}; fetch both again")
    outputs, width = _sizes(stored, codes)
    scales, overall = _scales(stored, module, codes), stored.tensors.get(f"{module}.weight_global_scale")
    if (args.strategy == "tensor_group") != (overall is not None):
        has = "no weight_global_scale" if overall is None else "a weight_global_scale"
        raise stored.error(codes, f"has {has} beside it, but the strategy {args.strategy}; fetch both again")
    if overall is not None and (overall.dtype, overall.shape) != ("F32", (1,)):
        raise stored.error(overall, f"is {overall.dtype}, and must be one float32 [1]; fetch it again")
    if scales.dtype != ("U8" if overall is None else "F8_E4M3"):
        raise stored.error(scales, f"is {scales.dtype}, which {group.format} has not; fetch it again")
    # The library unpacks to bfloat16, and so rounds to it.
    dtype, block = float_dtype(stored.config), (1, args.group)
    if 2 * width % args.group:
        raise stored.error(codes, f"has {2 * width} columns, which {args.group} does not divide; fetch it again")
    found = Scaled(
        *(codes, scales, block, dtype, outputs),
        packed=True,
        overall=overall,
        divides=True,
        between="BF16",
        style="powers" if overall is None else "span",
    )
    _check_grid(stored, scales, found, args)
    return coded(f"{module}.weight", dtype, (outputs, 2 * width), found)


def _packed(stored: Stored, module: str, codes: TensorInfo, group: Group) -> TensorInfo:
    return read_packed(stored, module, _args(group))


READERS: dict[str, Reader] = {
    "pack-quantized": _packed,
    "float-quantized": _plain,
    "int-quantized": _plain,
    "naive-quantized": _plain,
    "mxfp8-quantized": _plain,
    "nvfp4-pack-quantized": _fp4,
    "mxfp4-pack-quantized": _fp4,
}
"""By what a group's `format` says."""


def _args(group: Group) -> Weights:
    assert group.weights is not None
    return group.weights


def _sizes(stored: Stored, codes: TensorInfo) -> tuple[int, int]:
    if len(codes.shape) != 2:
        raise stored.error(codes, "is no matrix, and only those are quantized; fetch it again")
    return codes.shape[0], codes.shape[1]


def _scales(stored: Stored, module: str, codes: TensorInfo) -> TensorInfo:
    found = stored.tensors.get(f"{module}.weight_scale")
    if found is None:
        raise stored.error(codes, f"has no {module}.weight_scale beside it; fetch that file again")
    return found


def _between(scales: TensorInfo) -> str:
    """The dtype that the library computes in: that of the scales; bfloat16 for powers of two."""
    return scales.dtype if scales.dtype in ("F16", "BF16") else "BF16" if scales.dtype == "U8" else "F32"


def _block(stored: Stored, codes: TensorInfo, args: Weights, outputs: int, width: int) -> tuple[int, int]:
    if args.strategy == "tensor":
        return max(1, outputs), max(1, width)
    if args.strategy == "channel":
        return 1, max(1, width)
    if args.block is not None:
        return args.block
    if args.group is None or args.strategy != "group":
        raise stored.error(codes, f"has the strategy {args.strategy}, which is not read for {codes.dtype}")
    if width % args.group:
        raise stored.error(codes, f"has {width} columns, which groups of {args.group} do not divide; fetch it again")
    return 1, args.group


def _check_grid(stored: Stored, scales: TensorInfo, found: Scaled, args: Weights) -> None:
    allowed = {found.grid} | ({(), (1,)} if args.strategy == "tensor" else set())
    if scales.shape not in allowed:
        raise stored.error(scales, f"must be {list(found.grid)} ({args.strategy}); fetch it again")
