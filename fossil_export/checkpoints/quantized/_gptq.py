"""GPTQ, as AutoGPTQ, GPTQModel and Auto-Round write it: codes of 2, 3, 4 or 8 bits in words of 32.

    W[o, i] = (code[i, o] − zero[g[i], o]) · scale[g[i], o]      rounded once to the dtype of the scales

`X.qweight` (in · bits / 32, out) int32, packed along `in`; `X.scales` (groups, out); `X.qzeros` (groups,
out · bits / 32) int32, packed along `out`; `X.g_idx` (in,) int32, the group of each input (without: they are in order).
"gptq" stores zeros less one, "gptq_v2" as they are. Source: `PackableQuantLinear.dequantize_weight` in
gptqmodel/nn_modules/qlinear/__init__.py, `convert_gptq_v1_to_v2_format_module` in gptqmodel/utils/model.py; packing
formats of Auto-Round in auto_round/inference/backend.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._coding import Decode, Encoder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._transposed import transposed
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded
from fossil_export.checkpoints.quantized._integers import WORD, Steps, as_bytes, packed, unpacked
from fossil_export.checkpoints.quantized._words import (
    AUTO_ROUND,
    CODES,
    Settings,
    is_auto_round,
    left_over,
    read_settings,
    refused,
    whole_scales,
)

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": True, "gptq_v2": False}
"""Whether zeros are stored less one."""

PACKINGS = {"auto_round:auto_gptq": True, "auto_round:gptqmodel": False, "auto_round": False}
"""The same of Auto-Round's."""

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class GptqCodes:
    """The tensors of one weight. `in_order` is whether the config says that groups are (desc_act is false); `sym` that
    all zeros are in the middle; with `less_one` zeros are stored less one, and with `carry` in one sum a word."""

    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo
    order: TensorInfo | None
    bits: int
    group: int
    less_one: bool
    carry: bool
    sym: bool
    in_order: bool

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.zeros, *((self.order,) if self.order is not None else ())

    @property
    def width(self) -> int:
        return self.codes.shape[0] * WORD // self.bits

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        words = rows_of(self.codes, 0, self.codes.shape[0])[:, start:stop]
        steps = self._steps(rows_of, start, stop)

        def codes_of(first: int, last: int) -> Array:
            return unpacked(as_bytes(words[:, first:last].T), self.bits)

        return lambda first, last: steps.decode(first, last, codes_of, self.width)

    def encoder(self, rows_of: ReadRows) -> Encoder:
        return _GptqEncoder(self, self._steps(rows_of, 0, self.codes.shape[1]), rows_of)

    def _steps(self, rows_of: ReadRows, start: int, stop: int) -> Steps:
        groups = self.scales.shape[0]
        scales = whole_scales(self.scales, rows_of(self.scales, 0, groups)[:, start:stop])
        # Of zeros, whole runs of 32 are read: a code may lie in two words.
        first, last = start // WORD, -(-stop // WORD)
        words = rows_of(self.zeros, 0, groups)[:, first * self.bits : last * self.bits]
        zeros = self._whole_zeros(words)[:, start - first * WORD : stop - first * WORD]
        if self.sym and (zeros != 1 << self.bits - 1).any():
            raise refused(
                self.zeros,
                f"holds other zeros than {1 << self.bits - 1}, which contradicts the config's sym true; mend its "
                "checkpoint_format, or sym",
            )
        return Steps(scales.T, zeros.T, self._groups(rows_of), self.bits, self.scales.dtype)

    def _whole_zeros(self, words: Array) -> Array:
        import numpy as np

        top = (1 << self.bits) - 1
        stored = unpacked(as_bytes(words), self.bits)
        if not self.less_one:
            return stored
        if not self.carry:
            if (stored == top).any():
                raise refused(
                    self.zeros,
                    f"holds zeros of {top}, less one, which loaders read as 0 or as {top + 1}; save it as gptq_v2 with "
                    "the library that made it",
                )
            return stored + np.uint8(1)
        if self.bits == 3:
            return (stored + np.uint8(1)) & np.uint8(top)
        ones = np.uint32(sum(1 << shift for shift in range(0, WORD, self.bits)))
        return unpacked(as_bytes(np.ascontiguousarray(words).view(np.uint32) + ones), self.bits)

    def _groups(self, rows_of: ReadRows) -> int | Array:
        """The number of columns of a group, or the group of each column."""
        import numpy as np

        in_order = np.arange(self.width) // self.group
        found = in_order
        if self.order is not None:
            found = rows_of(self.order, 0, self.width)[:].astype(np.intp)
            if found.min() < 0 or found.max() >= self.scales.shape[0]:
                raise refused(
                    self.order,
                    f"names groups from {found.min()} to {found.max()}, of {self.scales.shape[0]} that there are",
                )
            if self.in_order and (found != in_order).any():
                raise refused(self.order, "has groups out of order, which contradicts the config's desc_act false")
        if self.width % self.group == 0 and (found == in_order).all():
            return self.group
        return found


@dataclass(frozen=True)
class _GptqEncoder:
    coding: GptqCodes
    steps: Steps
    rows_of: ReadRows

    def encode(self, matrix: Array) -> Mapping[str, Array]:
        import numpy as np

        others = {info.name: self.rows_of(info, 0, info.shape[0])[:] for info in self.coding.stored[1:]}
        words = packed(self.steps.encode(matrix), self.coding.bits).view(np.int32)
        return {self.coding.codes.name: np.ascontiguousarray(words.T)} | others


class Gptq(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is None:
            return any(name.endswith(CODES) for name in stored.tensors)
        if is_auto_round(stored.settings):
            return "awq" not in str(stored.settings.get("packing_format"))
        return stored.method in ("gptq", "marlin")

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        settings, less_one = self._settings(stored)
        meta = (stored.settings or {}).get("meta")
        carry = isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer"))
        taken: set[str] = set()
        for name, codes in stored.tensors.items():
            if not name.endswith(CODES):
                continue
            module = name.removesuffix(CODES)
            coding = self._coding(stored, module, codes, settings, less_one, carry)
            taken.update(info.name for info in coding.stored)
            found = coded(f"{module}.weight", coding.scales.dtype, (codes.shape[1], coding.width), coding)
            if transposed(found.name, {found.name: found}, stored.config) is not None:
                raise stored.error(codes, "is of a Conv1D layer, which is not read; dequantize it with GPTQModel first")
            yield found
        left_over(stored, taken)

    def _settings(self, stored: Stored) -> tuple[Settings, bool]:
        found = stored.settings
        if found is None:
            raise stored.error(
                "config.json",
                "has no quantization_config, though tensors are quantized (*.qweight); fetch the base's own "
                "config.json, and its quantize_config.json if it has one",
            )
        if is_auto_round(found):
            packing = found.get("packing_format", found.get("backend"))
            if not isinstance(packing, str) or packing not in PACKINGS:
                raise stored.error("packing_format", f"is {packing!r} in config.json, which is not read; {AUTO_ROUND}")
            return read_settings(stored, BITS), PACKINGS[packing]
        kind = found.get("checkpoint_format") or found.get("format") or "gptq"
        if stored.method == "marlin" or found.get("is_marlin_format") or kind == "marlin":
            raise stored.error(
                "config.json",
                "says that weights are in Marlin's order, which is not read; take the base in gptq format",
            )
        if not isinstance(kind, str) or kind not in FORMATS:
            raise stored.error("checkpoint_format", f"is {kind!r} in config.json; read are {' and '.join(FORMATS)}")
        return read_settings(stored, BITS), FORMATS[kind]

    def _coding(
        self, stored: Stored, module: str, codes: TensorInfo, settings: Settings, less_one: bool, carry: bool
    ) -> GptqCodes:
        if module.rpartition(".")[2] in EMBEDDINGS:
            raise stored.error(codes, "is a quantized embedding, which is not read; dequantize it with GPTQModel first")
        zeros, scales = settings.beside(stored, module, codes)
        order = stored.tensors.get(f"{module}.g_idx")
        outputs = codes.shape[1]
        bits = zeros.shape[1] * WORD // outputs if outputs else 0
        if bits not in settings.bits or bits * outputs != zeros.shape[1] * WORD:
            raise stored.error(
                zeros, f"is not that of {outputs} outputs with {' or '.join(map(str, sorted(settings.bits)))} bits"
            )
        width = codes.shape[0] * WORD // bits
        if width * bits != codes.shape[0] * WORD or (bits == 3 and (width % WORD or outputs % WORD)):
            raise stored.error(codes, f"has no whole runs of {WORD} codes of {bits} bits, and is not read")
        group = settings.group(stored, scales, width, order is not None)
        if scales.shape != (zeros.shape[0], outputs):
            raise stored.error(scales, f"must be {[zeros.shape[0], outputs]}, as {zeros.name} has it; fetch it again")
        if order is None and settings.desc_act:
            raise stored.error(codes, f"has no {module}.g_idx beside it, which desc_act asks for; fetch it again")
        if order is not None and (order.shape != (width,) or order.dtype != "I32"):
            raise stored.error(order, f"is {order.dtype} and must be I32 [{width}], for {bits} bits; fetch it again")
        return GptqCodes(
            codes,
            scales,
            zeros,
            order,
            bits,
            group,
            less_one,
            carry,
            settings.sym is True,
            settings.desc_act is False,
        )
