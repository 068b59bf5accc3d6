"""DoRA: LoRA, with the length of each row trained on its own.

    W'[o] = m[o] / |V[o]| · V[o]        V = W + s · B A        m (out), A (r, in), B (out, r)

Of an embedding (tokens, dims) the columns have lengths, over all tokens: m (dims). Of a convolution m is (1, out, 1,
…). Source: arXiv 2402.09353, section 4; `get_weight_norm` in peft/tuners/lora/dora.py and `merge_unsafe` in
peft/tuners/lora/variants.py, whose order this is: the sum, its lengths and the quotient in float32, then the product.
The squares are added up in float64, so that both engines give the same; PEFT's own sums in float32 are a few steps off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import _lora as lora
from fossil_export.methods import _lora_embedding as lora_embedding
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes

MAGNITUDE = {"lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}
# PEFT writes the first; the second is the parameter's name in a model's own state dict.


class Dora(lora.Lora):
    PEFT = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B", **MAGNITUDE}}
    COMBINES: Combination = "alone"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if "m" not in shapes or shapes.keys() == {"m"}:
            return None
        numbers = super().read(config, module, shapes, where)
        refuse_strangers(config, shapes, shapes["B"][0], where)
        return numbers

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**super().part(arrays, start, stop), "m": magnitudes(arrays["m"], start, stop)}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        changed = weight + super().update(weight, arrays, numbers, start)
        stretch(changed, arrays["m"], start)
        changed -= weight
        return changed

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight += super().update(weight, arrays, numbers, start)
        stretch(weight, arrays["m"], start)

    def form_rank(self, shapes: Shapes) -> int | None:
        return None

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        return None


class DoraEmbedding(lora_embedding.LoraEmbedding):
    """The whole weight at once, for the lengths of its columns."""

    PEFT = {"LORA": {"lora_embedding_A": "A", "lora_embedding_B": "B", **MAGNITUDE}}
    COMBINES: Combination = "alone"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if "m" not in shapes:
            return None
        if shapes.keys() == {"m"}:
            raise AdapterError(f"{where}: its lora_A and lora_B are missing; save the adapter again")
        numbers = super().read(config, module, shapes, where)
        refuse_strangers(config, shapes, shapes["B"][0], where)
        return numbers

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["A"][1]

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**super().part(arrays, start, stop), "m": arrays["m"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        changed = weight + 0
        self.add(changed, arrays, numbers, start)
        changed -= weight
        return changed

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        if len(weight) != arrays["A"].shape[1]:
            raise MergeError(
                "the lengths of an embedding's columns need all of its rows at once; merge the whole model"
            )
        weight += super().update(weight, arrays, numbers, start)
        weight *= (arrays["m"] / lengths(weight.T))[None, :]


def refuse_strangers(config: Mapping[str, Any], shapes: Shapes, outputs: int, where: str) -> None:
    """Raise AdapterError if the config does not say DoRA, or the lengths are not one an output."""
    if not config.get("use_dora"):
        raise AdapterError(
            f"{where}: has a lora_magnitude_vector, but the config does not say use_dora; mend the config"
        )
    if math.prod(shapes["m"]) != outputs or max(shapes["m"]) != outputs:
        raise AdapterError(f"{where}: its magnitudes are not one for each of {outputs} outputs; save the adapter again")


def magnitudes(array: Any, start: int, stop: int) -> Any:
    """Those of rows [start, stop), in as many dimensions as they have."""
    return array[start:stop] if len(array.shape) == 1 else array[:, start:stop]


def stretch(weight: Any, array: Any, start: int) -> None:
    """Give the rows, which begin at row `start`, their lengths."""
    weight *= (magnitudes(array, start, start + len(weight)).reshape(-1) / lengths(weight))[:, None]


def lengths(rows: Any) -> Any:
    """|row| of each row, rounded once to their dtype."""
    if hasattr(rows, "device") and hasattr(rows, "requires_grad"):  # a PyTorch tensor
        import torch

        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).to(rows.dtype)
    import numpy as np

    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)).astype(rows.dtype)
