"""compressed-tensors' pack-quantized: codes of 1 to 8 bits in words of 32, packed along the inputs.

    W[o, i] = (code[o, i] − zero[o, g[i]]) · scale[o, g[i]]      rounded once to the dtype of the scales

`X.weight_packed` (out, ⌈in · bits / 32⌉) int32, `X.weight_scale` (out, groups), `X.weight_zero_point`
(⌈out · bits / 32⌉, groups) int32, packed along `out` (without: the middle of the codes), `X.weight_shape` (2,), and of
older versions `X.weight_g_idx` (in,) int32, the group of each input. Source: `PackedQuantizationCompressor` in
compressed_tensors/compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export.checkpoints._coding import Decode, Encoder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import Stored, coded
from fossil_export.checkpoints.quantized._integers import WORD, Steps, as_bytes, packed, unpacked
from fossil_export.checkpoints.quantized._words import refused, whole_scales

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

PACKED = ".weight_packed"
SCALES = ("F16", "BF16", "F32")


class Args(Protocol):
    """How the config says that a weight is quantized; `actorder` "group": inputs are in groups by `weight_g_idx`."""

    @property
    def bits(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def strategy(self) -> str: ...

    @property
    def group(self) -> int | None: ...

    @property
    def actorder(self) -> str | None: ...


@dataclass(frozen=True)
class PackedCodes:
    codes: TensorInfo
    scales: TensorInfo
    sizes: TensorInfo
    zeros: TensorInfo | None
    order: TensorInfo | None
    bits: int
    group: int
    width: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.sizes, *(one for one in (self.zeros, self.order) if one is not None)

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        words = rows_of(self.codes, start, stop)[:]
        steps = self._steps(rows_of, start, stop)

        def codes_of(first: int, last: int) -> Array:
            return unpacked(as_bytes(words[first:last]), self.bits)

        return lambda first, last: steps.decode(first, last, codes_of, self.width)

    def encoder(self, rows_of: ReadRows) -> Encoder:
        return _PackedEncoder(self, self._steps(rows_of, 0, self.codes.shape[0]), rows_of)

    def _steps(self, rows_of: ReadRows, start: int, stop: int) -> Steps:
        import numpy as np

        sizes = [int(size) for size in rows_of(self.sizes, 0, 2)[:]]
        if sizes != [self.codes.shape[0], self.width]:
            raise refused(self.sizes, f"says {sizes}, the tensors {[self.codes.shape[0], self.width]}; fetch it again")
        scales = whole_scales(self.scales, rows_of(self.scales, start, stop)[:])
        if self.zeros is None:
            zeros = np.full(scales.shape, 1 << self.bits - 1, np.uint8)
        else:
            first, last = start // WORD * self.bits, min(-(-stop // WORD) * self.bits, self.zeros.shape[0])
            by_group = unpacked(as_bytes(rows_of(self.zeros, first, last)[:].T), self.bits)
            zeros = by_group.T[start % WORD :][: len(scales)]
        return Steps(scales, zeros, self._groups(rows_of), self.bits, self.scales.dtype)

    def _groups(self, rows_of: ReadRows) -> int | Array:
        import numpy as np

        if self.order is None:
            return self.group
        found: Array = rows_of(self.order, 0, self.width)[:].astype(np.intp)
        if (found == -1).all():  # made, and never set
            return self.group
        groups = self.width // self.group
        inside = bool(((found >= 0) & (found < groups)).all())
        if not inside or (np.bincount(found, minlength=groups) != self.group).any():
            raise refused(
                self.order, f"does not name each group {self.group} times; the base is damaged, fetch it again"
            )
        return found


@dataclass(frozen=True)
class _PackedEncoder:
    coding: PackedCodes
    steps: Steps
    rows_of: ReadRows

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        import numpy as np

        coding = self.coding
        codes = np.zeros((len(matrix), -(-coding.width // WORD) * WORD), np.uint8)
        codes[:, : coding.width] = self.steps.encode(matrix)
        words = packed(codes, coding.bits).view(np.int32)[:, : coding.codes.shape[1]]
        others = {info.name: self.rows_of(info, 0, info.shape[0])[:] for info in coding.stored[1:]}
        return {coding.codes.name: np.ascontiguousarray(words)} | others


def read_packed(stored: Stored, module: str, args: Args) -> TensorInfo:
    """The weight of a module that has `weight_packed`, which the config says to be quantized by `args`.

    Raises CheckpointError, naming the tensor, if something is missing, of another shape, or of a kind that is not read.
    """
    codes, scales, sizes = _three(stored, module)
    zeros, order = (stored.tensors.get(f"{module}.weight_{part}") for part in ("zero_point", "g_idx"))
    bits, outputs = args.bits, codes.shape[0]
    if args.kind != "int" or args.strategy not in ("group", "channel"):
        raise stored.error(
            codes, f"has {args.kind} codes by {args.strategy} in config.json; read are int codes by group and channel"
        )
    if args.strategy == "group":
        group = args.group or 0
        width = group * scales.shape[1]
    else:
        group = width = int(stored.values(sizes)[1])
    if -(-width * bits // WORD) != codes.shape[1] or (args.strategy == "channel" and scales.shape[1] != 1):
        size = f"groups of {args.group}" if args.strategy == "group" else "channels"
        raise stored.error(
            scales,
            f"and {codes.name} {list(codes.shape)} are not those of {bits} bits in {size}; fetch both again, and "
            "config.json",
        )
    if (zeros is None) is not args.symmetric:
        has = "no weight_zero_point" if zeros is None else "a weight_zero_point"
        raise stored.error(codes, f"has {has}, but symmetric is {args.symmetric} in config.json; fetch both again")
    wanted = (-(-outputs * bits // WORD), scales.shape[1])
    if zeros is not None and (zeros.shape != wanted or zeros.dtype != "I32"):
        raise stored.error(zeros, f"is {zeros.dtype} and must be I32 {list(wanted)}; fetch it again")
    if order is None and args.actorder == "group":
        raise stored.error(codes, f"has no {module}.weight_g_idx, which actorder asks for; fetch that file again")
    if order is not None and (order.shape != (width,) or order.dtype != "I32" or args.strategy != "group"):
        raise stored.error(order, f"is {order.dtype} and must be I32 [{width}], of groups; fetch it again")
    coding = PackedCodes(codes, scales, sizes, zeros, order, bits, group, width)
    return coded(f"{module}.weight", scales.dtype, (outputs, width), coding)


def _three(stored: Stored, module: str) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    """The codes of a module, their scales and the shape of the weight."""
    found = []
    for part in ("packed", "scale", "shape"):
        one = stored.tensors.get(f"{module}.weight_{part}")
        if one is None:
            raise stored.error(f"{module}.weight", f"has no {module}.weight_{part}; fetch that file again")
        found.append(one)
    codes, scales, sizes = found
    if len(codes.shape) != 2 or codes.dtype != "I32" or not all(codes.shape):
        raise stored.error(codes, f"is stored as {codes.dtype}, and must be a matrix of I32; it is not read")
    if sizes.shape != (2,) or sizes.dtype not in ("I64", "I32"):
        raise stored.error(sizes, f"is {sizes.dtype}, and must be two whole numbers; fetch it again")
    if len(scales.shape) != 2 or scales.dtype not in SCALES or scales.shape[0] != codes.shape[0] or not scales.shape[1]:
        raise stored.error(scales, f"is {scales.dtype}, and no scale of {codes.name} {list(codes.shape)}")
    return codes, scales, sizes
