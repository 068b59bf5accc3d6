"""AWQ in AutoAWQ's GEMM version: codes of 4 bits, eight outputs in a word.

    W[o, i] = (code[i, o] − zero[i // group, o]) · scale[i // group, o]      rounded once to the dtype of the scales

`X.qweight` (in, out / 8) int32, `X.qzeros` (groups, out / 8) int32, `X.scales` (groups, out). The lowest bits of a word
are output 0 of its eight, then come 2, 4, 6, 1, 3, 5, 7. Source: `dequantize_gemm` in awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode, Encoder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._transposed import transposed
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded
from fossil_export.checkpoints.quantized._integers import Steps
from fossil_export.checkpoints.quantized._words import (
    CODES,
    is_auto_round,
    left_over,
    read_settings,
    whole_scales,
)

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs of a word, from its lowest bits on."""

PACK = len(ORDER)


@dataclass(frozen=True)
class AwqCodes:
    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo
    group: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.zeros

    @property
    def width(self) -> int:
        return self.codes.shape[0]

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        origin = start // PACK
        words = rows_of(self.codes, 0, self.width)[:, origin : -(-stop // PACK)]
        steps = self._steps(rows_of, start, stop)

        def codes_of(first: int, last: int) -> Array:
            begin, end = start + first, start + last
            own = _by_output(words[:, begin // PACK - origin : -(-end // PACK) - origin])
            return own[begin % PACK : begin % PACK + last - first]

        return lambda first, last: steps.decode(first, last, codes_of, self.width)

    def encoder(self, rows_of: ReadRows) -> Encoder:
        return _AwqEncoder(self, self._steps(rows_of, 0, self.scales.shape[1]), rows_of)

    def _steps(self, rows_of: ReadRows, start: int, stop: int) -> Steps:
        groups, origin = self.scales.shape[0], start // PACK
        scales = whole_scales(self.scales, rows_of(self.scales, 0, groups)[:, start:stop])
        zeros = _by_output(rows_of(self.zeros, 0, groups)[:, origin : -(-stop // PACK)])
        own = zeros[start - origin * PACK : stop - origin * PACK]
        return Steps(scales.T, own, self.group, BITS, self.scales.dtype)


def _by_output(words: Array) -> Array:
    """The codes (8 n, k), uint8, of words (k, n)."""
    import numpy as np

    turned = np.ascontiguousarray(words.T).view(np.uint32)
    found = np.empty((len(turned), PACK, turned.shape[1]), np.uint8)
    for place, output in enumerate(ORDER):
        own = turned >> (BITS * place)
        own &= (1 << BITS) - 1
        found[:, output] = own
    return found.reshape(-1, turned.shape[1])


@dataclass(frozen=True)
class _AwqEncoder:
    coding: AwqCodes
    steps: Steps
    rows_of: ReadRows

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        import numpy as np

        codes = self.steps.encode(matrix).reshape(-1, PACK, matrix.shape[1])
        words = np.zeros((len(codes), matrix.shape[1]), np.uint32)
        for place, output in enumerate(ORDER):
            words |= codes[:, output].astype(np.uint32) << (BITS * place)
        others = {info.name: self.rows_of(info, 0, info.shape[0])[:] for info in self.coding.stored[1:]}
        return {self.coding.codes.name: np.ascontiguousarray(words.T).view(np.int32)} | others


class Awq(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is not None and is_auto_round(stored.settings):
            return "awq" in str(stored.settings.get("packing_format"))
        return stored.method == "awq"

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        found = stored.settings or {}
        version = str(found.get("version") or found.get("format") or "gemm").lower()
        if not is_auto_round(found) and (version != "gemm" or found.get("backend") == "llm-awq"):
            kind = "llm-awq" if found.get("backend") == "llm-awq" else version
            raise stored.error(
                "version", f"of AWQ is {kind!r} in config.json; read is gemm: quantize the model again in it"
            )
        if is_auto_round(found) and found.get("packing_format") != "auto_round:auto_awq":
            raise stored.error(
                "packing_format", f"is {found.get('packing_format')!r} in config.json; read is auto_round:auto_awq"
            )
        old = "w_bit" in found
        settings = read_settings(stored, (BITS,), *(("w_bit", "q_group_size") if old else ()))
        taken: set[str] = set()
        for name, codes in stored.tensors.items():
            if not name.endswith(CODES):
                continue
            module = name.removesuffix(CODES)
            zeros, scales = settings.beside(stored, module, codes)
            width, outputs = codes.shape[0], codes.shape[1] * PACK
            group = settings.group(stored, scales, width, False)
            wanted = (width // group, outputs)
            if width % group:
                raise stored.error(codes, f"has inputs that are no whole groups of {group}; fetch it again")
            if scales.shape != wanted:
                raise stored.error(scales, f"must be {list(wanted)} for that of {codes.name}; fetch it again")
            if zeros.shape != (wanted[0], codes.shape[1]):
                raise stored.error(
                    zeros, f"must be {[wanted[0], codes.shape[1]]} for that of {codes.name}; fetch it again"
                )
            coding = AwqCodes(codes, scales, zeros, group)
            weight = coded(f"{module}.weight", scales.dtype, (outputs, width), coding)
            if transposed(weight.name, {weight.name: weight}, stored.config) is not None:
                raise stored.error(codes, "is of a Conv1D layer, which is not read")
            taken.update(info.name for info in coding.stored)
            yield weight
        left_over(stored, taken)
