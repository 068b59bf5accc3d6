"""Quantized graphs: what was quantized is compared with the base once, and the trainer is given the same weights.

A graph in 4 bits is far from its base whatever was trained. The question here is the adapter's: so truth and
trainer run on the weights that the graph's codes stand for. In merged mode those codes were made from the merged
weights; there each must be within a step of what PEFT's own merge gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.errors import OnnxError
from fossil_export.onnx.builders._existing import find_graph
from fossil_export.onnx.graph._file import load_graph
from fossil_export.onnx.graph._match import QUANTIZED_TOLERANCE, Found, Wanted, find_places
from fossil_export.onnx.graph._sites import find_sites

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

STEPS = 1.01
"""Distance of a value from its code, in steps, that quantization explains: rounding is half of one, but the
symmetric codes -8 … 7 cut the largest value of a block by up to one."""

NOISE = 0.05
"""Relative error that ONNX Runtime's int4 products alone explain in the median position (twice that in the worst
tenth): they round activations to 8 bits (accuracy level 4). Measured in docs/parity.md."""


def is_quantized(folder: Path) -> bool:
    """Whether any product of the folder's graph reads a quantized weight."""
    sites = find_sites(load_graph(find_graph(folder)).graph)
    return any(site.weight.bits is not None for site in sites)


def take_weights(network: Any, folder: Path, check: bool) -> list[str]:
    """Give the linear layers of a transformers model the weights of the graph's quantized products, in place.

    The result lists the layers, one line each, whose codes are not the model's weights: with `check`, where the
    model's own weights are what was quantized, any value further from its code than `STEPS`; else those that
    are further off as a whole than any quantizer leaves them.
    """
    import torch

    graph = find_graph(folder)
    model = load_graph(graph)
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.dtype.is_floating_point
    }
    wanted = [Wanted(name, (name,), layer.weight.detach().float().numpy()) for name, layer in layers.items()]
    sites = [site for site in find_sites(model.graph) if site.weight.bits is not None]
    names = {name: layer.weight.shape[0] for name, layer in layers.items()}
    problems: list[str] = []
    for one in wanted:
        try:
            found = find_places([one], sites, names, str(graph))
        except OnnxError:
            continue  # not quantized (a head in full precision), or of another model: the logits will tell
        layer = layers[one.module]
        problems += _outside(one, found) if check else _far(one, found)
        with torch.no_grad():
            for site, piece in _pairs(found):
                values = torch.from_numpy(site.weight.read(slice(piece.at, piece.at + piece.count)).copy())
                layer.weight[piece.start : piece.start + piece.count] = values.to(layer.weight)
    return problems


def _pairs(found: Found) -> Iterator[tuple[Any, Any]]:
    for site, pieces in found.items():
        for piece in pieces:
            yield site, piece


def _far(one: Wanted, found: Found) -> Iterator[str]:
    """Codes that are further from the base's weight, as a whole, than quantizing takes them."""
    for site, piece in _pairs(found):
        base = one.weight[piece.start : piece.start + piece.count]
        error = np.linalg.norm(site.weight.read(slice(piece.at, piece.at + piece.count)) - base)
        if not error <= QUANTIZED_TOLERANCE.get(site.weight.bits or 8, 0.03) * np.linalg.norm(base):
            yield f"{one.module}: its codes in the graph are {error / np.linalg.norm(base):.0%} off the base's weight"


def _outside(one: Wanted, found: Found) -> Iterator[str]:
    for site, piece in _pairs(found):
        rows = slice(piece.at, piece.at + piece.count)
        steps = site.weight.spacing(rows) if site.weight.spacing is not None else None
        if steps is None:
            continue
        error = np.abs(site.weight.read(rows) - one.weight[piece.start : piece.start + piece.count])
        bad = error > STEPS * steps + 1e-12
        if bad.any():
            row, column = np.unravel_index(int(np.argmax(error / np.maximum(steps, 1e-30))), error.shape)
            far = error[row, column] / steps[row, column]
            yield (
                f"{one.module}.weight[{piece.start + row}, {column}] is {far:.3g} steps "
                f"from its code in the graph ({int(bad.sum()):,} elements are too far)"
            )
