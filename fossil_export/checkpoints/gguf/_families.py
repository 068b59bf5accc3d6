"""The families whose GGUF files transformers reads, and what llama.cpp's converter had done to their tensors.

Sources: the tensor processors in transformers/modeling_gguf_pytorch_utils.py, and gguf's tables of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fossil_export._extras import required
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.gguf._coding import FLOATS, Blocks, Halves, Thirds
from fossil_export.checkpoints.gguf._file import Packed
from fossil_export.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What was done to tensors: `rotary` if rows of q and k were moved within heads, `thirds` if q, k, v were parted;
    which parts of names had one added to their values (`plus_one`), the log undone (`negated`), or were `transposed`;
    `experts` if the experts' matrices are saved one by one."""

    rotary: bool = False
    thirds: bool = False
    plus_one: tuple[str, ...] = ()
    negated: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    experts: bool = False


_NORMS = ("norm.weight",)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(rotary=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen2moe": Family(experts=True),
    "qwen3moe": Family(experts=True),
    "phi3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "falcon": Family(),
    "bloom": Family(thirds=True),
    "gpt2": Family(transposed=("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")),
    "mamba": Family(negated=("ssm_a",)),
    "nemotron": Family(plus_one=_NORMS),
    "gemma2": Family(plus_one=_NORMS),
    "gemma3": Family(plus_one=_NORMS),
    "t5": Family(),
}
"""By `general.architecture`."""

ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that only say how positions are scaled."""
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class Weights:
    """The weights of transformers in the `tensors` of the GGUF file of a family; `config` is that of transformers with
    all defaults."""

    def __init__(self, architecture: str, tensors: Mapping[str, Packed], config: Mapping[str, Any]) -> None:
        self._architecture, self._family = architecture, FAMILIES[architecture]
        self._tensors, self._config = tensors, config
        self.taken: set[str] = set()

    def read(self, shapes: Mapping[str, tuple[int, ...]], ties: Mapping[str, str]) -> Iterator[TensorInfo]:
        """A tensor for each parameter of these shapes. Raises CheckpointError for those that the file does not have."""
        known = self.names(shapes)
        stored = {ties.get(name, name): gguf for gguf, name in known.items() if gguf in self._tensors}
        for name, shape in shapes.items():
            if name in ties:
                continue
            if self._family.experts and (match := _EXPERTS.match(name)):
                yield from self._experts(match[1], match[2], shape)
            elif name not in stored:
                raise CheckpointError(
                    f"{self._path}: has no tensor for {name}, which transformers' {self._architecture} needs; {REMEDY}"
                )
            else:
                yield self._weight(name, shape, self._tensors[stored[name]])

    def names(self, parameters: Iterable[str]) -> dict[str, str]:
        """GGUF's names of parameters, by which transformers finds them: of the whole name, else without its first
        parts, as the modules within the model would have it."""
        gguf = required("gguf", "gguf", "reading GGUF files")
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture)
        layers = self._config.get("num_hidden_layers") or self._config.get("n_layer") or self._config.get("num_layers")
        table = gguf.get_tensor_name_map(kind, layers or 0)
        found: dict[str, str] = {}
        left = {name: name for name in parameters}
        while left:
            level: dict[str, str] = {}
            for name, rest in left.items():
                plain, dot, ending = rest.rpartition(".")
                if ending not in ("weight", "bias"):
                    plain, dot, ending = rest, "", ""
                if (known := table.get_name(plain)) is not None:
                    level[known + dot + ending] = name
            found = level | found
            left = {name: rest.partition(".")[2] for name, rest in left.items() if "." in rest}
        return found

    @property
    def _path(self) -> Any:
        return next(iter(self._tensors.values())).codes.path

    def _take(self, name: str) -> Packed:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path}: has no tensor {name}; fetch it again")
        self.taken.add(name)
        return self._tensors[name]

    def _weight(self, name: str, shape: tuple[int, ...], packed: Packed) -> TensorInfo:
        self._take(packed.name)
        family, found = self._family, packed.shape
        one = Blocks(packed.codes, packed.kind, packed.shape[-1])
        if any(part in packed.name for part in family.transposed):
            one, found = replace(one, change="transposed"), packed.shape[::-1]
        elif any(part in packed.name for part in family.plus_one):
            one = replace(one, change="minus one")
        elif any(part in packed.name for part in family.negated):
            one = replace(one, change="log of negated")
        elif family.rotary and (".attn_q." in packed.name or ".attn_k." in packed.name):
            key = "num_attention_heads" if ".attn_q." in packed.name else "num_key_value_heads"
            one = self._ordered(one, packed, Halves(self._part(packed, self._config[key], 2)))
        elif family.thirds and "attn_qkv" in packed.name:
            heads = self._config["n_head"]
            one = self._ordered(one, packed, Thirds(heads, self._part(packed, heads, 3) // 3))
        if [size for size in found if size > 1] != [size for size in shape if size > 1]:
            raise self._unlike(packed, name, shape)
        if packed.kind == "F32" and one.order is None and not one.change:
            return TensorInfo(name, "F32", shape, packed.codes.path, packed.codes.offset)
        return _coded(name, shape, one)

    def _part(self, packed: Packed, heads: int, parts: int) -> int:
        """Rows of a head, which consist of so many parts."""
        rows = packed.shape[0]
        if rows % (heads * parts):
            raise CheckpointError(
                f"{self._path}: {packed.name} {list(packed.shape)} does not divide into {heads} heads; fetch it again"
            )
        return rows // heads

    def _ordered(self, one: Blocks, packed: Packed, order: Halves | Thirds) -> Blocks:
        if len(packed.shape) > 1:
            return replace(one, order=order)
        if packed.kind not in FLOATS:
            raise CheckpointError(f"{self._path}: {packed.name} is a bias of type {packed.kind}; fetch it again")
        count = packed.shape[0]
        codes = replace(packed.codes, shape=(count, packed.codes.shape[1] // count))
        return Blocks(codes, packed.kind, 1, order)

    def _experts(self, module: str, kind: str, shape: tuple[int, ...]) -> Iterator[TensorInfo]:
        """The matrices of the experts, which transformers keeps in one tensor and saves one by one."""
        block = re.search(r"\.layers\.(\d+)\.", module)
        assert block is not None, module
        count, outputs, inputs = shape
        parts = {"gate_proj": "gate", "up_proj": "up"} if kind == "gate_up_proj" else {"down_proj": "down"}
        rows = outputs // len(parts)
        found = {}
        for part, label in parts.items():
            packed = self._take(f"blk.{block[1]}.ffn_{label}_exps.weight")
            if packed.shape != (count, rows, inputs):
                raise self._unlike(packed, f"{module}.{kind}", (count, rows, inputs))
            found[part] = _coded(part, packed.shape, Blocks(packed.codes, packed.kind, inputs))
        for number in range(count):
            for part, whole in found.items():
                one = slice_of(whole, number * rows * inputs, rows * inputs, (rows, inputs))
                yield replace(one, name=f"{module}.{number}.{part}.weight")

    def _unlike(self, packed: Packed, name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {packed.name} {list(packed.shape)} is not {name} {list(shape)}, as transformers makes it "
            f"of the file's metadata; put the config.json of the original model beside the file, or {REMEDY}"
        )


REMEDY = "merge into the model's safetensors instead"


def _coded(name: str, shape: tuple[int, ...], coding: Blocks) -> TensorInfo:
    assert prod(shape) % coding.width == 0
    return TensorInfo(name, "F32", shape, coding.codes.path, None, coding=coding)
