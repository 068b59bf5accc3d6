"""Quantized graphs: what was quantized is compared with the base once, and the trainer is given the same weights.

A graph in 4 bits is far from its base whatever was trained. The question here is the adapter's: so truth and
trainer run on the weights that the graph's codes stand for. In merged mode those codes were made from the merged
weights; there each must be within a step of what PEFT's own merge gives.

ONNX Runtime rounds the inputs of a MatMulNBits to 8 bits if the node's accuracy level is 4, which says nothing of the
graph, and grows with the model's own sensitivity. So graphs are judged at level 1, products in the graph's own dtype,
and only measured at level 4.
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
    from fossil_export.verifying._models import Runner

    Array = np.ndarray[Any, Any]

STEPS = 1.01
"""Distance of a value from its code, in steps, that quantization explains: rounding is half of one, but the
symmetric codes -8 … 7 cut the largest value of a block by up to one."""

NOISE = 0.05
"""Relative error, in the median position (twice that in the worst tenth), that is allowed a quantized graph that cannot
be run with products of full precision. Guessed: graphs of one model came to 0.033, those of another to 0.061."""

_LEVEL, _EIGHT_BITS, _FULL = "accuracy_level", 4, 1

_ROUNDING = (
    "DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "QAttention", "QGemm", "QLinearMatMul", "QMoE", "QuantizeLinear",
)  # fmt: skip
"""Operators that compute with rounded inputs whatever is asked of them, or with codes that `take_weights` knows not."""


def _exact_products(graph: Path, known: set[str]) -> bool | None:
    """Whether the graph's quantized products compute in its own dtype, as it is stored (True) or with `raise_level`
    (False); None if neither is known. `known` are the scales of the weights that truth and trainer were given."""
    model = load_graph(graph)
    as_stored = True
    for node in (node for one in model.graphs() for node in one):
        if node.op_type in _ROUNDING:
            return None
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized") and _scales(node) not in known:
            return None  # an embedding with codes of its own, a product that is no linear layer of the model
        if node.op_type == "DequantizeLinear":
            return None  # with a product after it, ONNX Runtime may make a MatMulNBits of the two, with its own level
        as_stored &= _level(node) != _EIGHT_BITS
    return as_stored


def raise_level(model: Any) -> None:
    """Have each product that is asked for in 8 bits computed in the dtype of its inputs, in place."""
    for node in (node for one in model.graphs() for node in one):
        if _level(node) == _EIGHT_BITS:
            import onnx_ir as ir

            node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FULL)


def _level(node: Any) -> Any:
    return node.attributes[_LEVEL].value if node.op_type == "MatMulNBits" and _LEVEL in node.attributes else 0


def _scales(node: Any) -> str:
    return str(node.inputs[2].name) if len(node.inputs) > 2 and node.inputs[2] is not None else ""


class Codes:
    """The quantized weights of a graph in a folder: what truth and trainer are given, and how the graph is run.

    `merged` says that its codes were made from merged weights. `problems` are those of the last call of `give`.
    """

    def __init__(self, folder: Path, device: str, merged: bool) -> None:
        self._folder, self._device, self._merged = folder, device, merged
        self._known: set[str] = set()
        self.problems: list[str] = []

    def give(self, network: Any) -> None:
        self._known = set()
        self.problems[:] = take_weights(network, self._folder, check=self._merged, known=self._known)

    def exact(self) -> tuple[Runner, bool] | None:
        """`Subject.exact`. On a GPU the graph is run as it is: products there do not round their inputs to 8 bits, and
        may do so to TF32."""
        from fossil_export.verifying._onnx_models import OnnxRunner

        as_stored = _exact_products(find_graph(self._folder), self._known)
        if as_stored is None or self._device.startswith("cuda"):
            return None
        try:
            return OnnxRunner(self._folder, self._device, exact=not as_stored), as_stored
        except OnnxError:
            if as_stored:
                raise
            return None  # without kernels for that level


def is_quantized(folder: Path) -> bool:
    """Whether any product of the folder's graph reads a quantized weight."""
    sites = find_sites(load_graph(find_graph(folder)).graph)
    return any(site.weight.bits is not None for site in sites)


def take_weights(network: Any, folder: Path, check: bool, known: set[str] | None = None) -> list[str]:
    """Give the linear layers of a transformers model the weights of the graph's quantized products, in place.

    The result lists the layers, one line each, whose codes are not the model's weights: with `check`, where the
    model's own weights are what was quantized, any value further from its code than `STEPS`; else those that
    are further off as a whole than any quantizer leaves them. `known` takes the names of the scales of those that were
    given.
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
                if known is not None and site.node.op_type == "MatMulNBits":
                    known.add(_scales(site.node))
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
