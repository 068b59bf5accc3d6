"""FourierFT: W'[o, j] = W[o, j] + s / (out in) · sum over k of c[k] cos(2π (u[k] o / out + v[k] j / in)).

(u, v) are the places that PyTorch draws from the seed. Merge and check both have the sum in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.verifying.reference._exact import Arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def unit(tensors: Mapping[str, TensorInfo]) -> int:
    return 1 << 40  # all rows, however many


def part(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {"c": arrays["c"][:]}


def rebuild(weight: Array, part: Arrays, numbers: Mapping[str, Any], exact: Array) -> Array:
    import numpy as np
    import torch

    outputs, inputs = weight.shape
    generator = torch.Generator()
    generator.manual_seed(numbers["seed"])
    drawn = torch.randperm(outputs * inputs, generator=generator).numpy()[: len(part["c"])]
    first, second = np.divmod(drawn, inputs)
    # Whole turns are taken out before they are rounded.
    rows = 2 * np.pi / outputs * (np.arange(outputs)[:, None] * first % outputs)
    columns = 2 * np.pi / inputs * (second[:, None] * np.arange(inputs) % inputs)
    factor = numbers["scale"] / (outputs * inputs)
    sizes = part["c"] * factor
    np.matmul(np.cos(rows) * sizes, np.cos(columns), out=exact)
    exact -= (np.sin(rows) * sizes) @ np.sin(columns)
    exact += weight
    return np.full(weight.shape, np.abs(sizes).sum() * (len(sizes) + 64) * 2.0**-50)


def up(part: Arrays, numbers: Mapping[str, Any]) -> None:
    return None


def down(arrays: Arrays, numbers: Mapping[str, Any], inputs: int) -> None:
    return None
