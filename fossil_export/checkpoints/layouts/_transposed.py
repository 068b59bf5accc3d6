"""A tensor (in, out): what transformers' Conv1D saves, the linear layer of GPT-2 and its kin.

Source: `Conv1D` in transformers/pytorch_utils.py and who uses it in transformers/models. Such a weight is merged whole:
a row of the matrix is a column of the tensor, and the models are old and small. Experts may lie so too, in one tensor
(n, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts._matrix import InOneTensor, ReadRows, Rows, Stored
from fossil_export.checkpoints.layouts._rows import flattened
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MODEL_TYPES = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""Whose attention and feed-forward layers are Conv1D."""

_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")
# Names of those layers, in all of them; the models' other linear layers are plain.


@dataclass(frozen=True)
class Transposed(InOneTensor):
    number: int = 0
    """Of the matrix, among those of a tensor (n, in, out)."""

    @property
    def shape(self) -> tuple[int, int]:
        inputs, outputs = self.info.shape[-2:]
        return outputs, inputs

    @property
    def span(self) -> tuple[int, int]:
        size = element_count(self.shape)
        return self.number * size, (self.number + 1) * size

    def unit(self, rows: int) -> int:
        return self.shape[0]

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        first = self.number * self.shape[1]
        found: Rows = rows_of(flattened(self.info), first, first + self.shape[1])[:].T
        return found

    def write(self, rows: Array, start: int) -> Iterator[Stored]:
        yield Stored(self.span[0], rows.T)


def transposed_slice(info: TensorInfo, number: int) -> Transposed:
    """Where a weight (out, in) lies that is number `number` of a tensor (n, in, out): an expert that is saved as it is
    multiplied from the right, say. Raises CheckpointError if there is none."""
    if len(info.shape) != 3 or not 0 <= number < info.shape[0]:
        raise CheckpointError(
            f"{info.path}: {info.name} {list(info.shape)} has no matrix {number}; its config.json describes another"
        )
    return Transposed(info, number)


def transposed(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Transposed | None:
    """By the model's type and the layer's name; sizes would not tell where they are equal.

    A type of its own, or no config, says nothing. Then the layers beside it tell, by the side that their bias has.
    """
    info = tensors.get(name)
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    if info is None or len(info.shape) != 2 or last not in _LAYERS:
        return None
    beside = (f"{parent}.{layer}" for layer in _LAYERS)
    if is_conv1d(name, config) or any(_inputs_first(layer, tensors) for layer in beside):
        return Transposed(info)
    return None


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the weight `name` is of a Conv1D, by the model's type and the layer's name."""
    if name.removesuffix(".weight").rpartition(".")[2] not in _LAYERS:
        return False
    # Of a model of two others (vision-encoder-decoder, say) config.json has a part for each, by the name's beginning.
    part = config.get(name.partition(".")[0])
    return (part if isinstance(part, dict) and "model_type" in part else config).get("model_type") in MODEL_TYPES


def _inputs_first(layer: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the weight of a layer has its outputs, of which its bias has one each, on the second side alone."""
    weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
    if weight is None or bias is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
        return False
    return bias.shape == weight.shape[1:]
