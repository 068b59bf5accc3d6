"""`.onnx_adapter` files: the trained tensors of one adapter under the names of a graph's optional inputs."""

from __future__ import annotations

import errno
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import WeightRows
from fossil_export.errors import OnnxError, listed
from fossil_export.merging._plan import MergePlan
from fossil_export.onnx._refusals import check_mode
from fossil_export.onnx._signature import Signature, Slot, digest, fingerprint, saved_digests
from fossil_export.onnx._trained import base_values, is_tiled, joined, lora_form
from fossil_export.onnx.graph._weight import round_to

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

ADAPTER = "adapter.onnx_adapter"
"""The file beside a swappable graph that holds the adapter it was exported with."""


def adapter_arrays(adapter: Adapter, signature: Signature, graph: Path) -> dict[str, Array]:
    """The value of every input of `graph` that `adapter` has something for, in the graph's dtype.

    Where a kind of layers is trained in some layers only, the others get zeros; kinds that are not trained at all are
    left to the graph's default. Raises OnnxError for what the graph has no place for.
    """
    check_mode(adapter, "swappable")
    if not signature.takes_lora and not all(map(is_tiled, adapter.trained.values())):
        raise OnnxError(
            f"{adapter.path}: is a {adapter.variant} adapter, which has two matrices a layer, and {graph} has one "
            "input for each, for FOSSIL's shards; export a swappable graph with this adapter, which takes both kinds"
        )
    names = _names(adapter, signature)
    known = replace(adapter, trained={module: adapter.trained[name] for module, name in names.items()})
    _check_sizes(known, signature)
    kinds = {slot.kind for slot in signature.slots if any(piece.module in names for piece in slot.pieces)}
    slots = [slot for slot in signature.slots if slot.kind in kinds]
    arrays: dict[str, Array] = {}
    if signature.takes_lora:
        for slot in slots:
            up, down = lora_form(known, slot.pieces, slot.outputs, slot.inputs)
            arrays[slot.down] = _rounded(known, slot, slot.down, down.T)
            arrays[slot.name] = _rounded(known, slot, slot.name, up)
        return arrays
    ranks = _ranks(known, signature)
    for slot in slots:
        arrays[slot.name] = _rounded(known, slot, slot.name, joined(known, slot.pieces, slot.outputs, ranks[slot.kind]))
    return arrays


def _check_sizes(adapter: Adapter, signature: Signature) -> None:
    """Raise OnnxError for a module that does not fit its layer; `adapter` has the graph's names."""
    widths: dict[str, int] = defaultdict(int)
    inputs: dict[str, int] = {}
    for slot in signature.slots:
        for piece in slot.pieces:
            widths[piece.module] = max(widths[piece.module], piece.start + piece.count)
            inputs[piece.module] = slot.inputs
    for module, trained in adapter.trained.items():
        if is_tiled(trained) and trained.rank > inputs[module]:
            raise OnnxError(
                f"{adapter.path}: {trained.module} has rank {trained.rank}, its layer {inputs[module]} inputs"
            )
    for module, trained in adapter.trained.items():
        if reason := trained.mismatch((widths[module], inputs[module])):
            raise OnnxError(
                f"{adapter.path}: {trained.module} does not fit the graph's layer [{widths[module]}, "
                f"{inputs[module]}]: {reason}; it belongs to another model"
            )


def _ranks(adapter: Adapter, signature: Signature) -> dict[str, int]:
    """The rank of each kind of layers. Raises OnnxError if one has several."""
    ranks: dict[str, set[int]] = defaultdict(set)
    for slot in signature.slots:
        for piece in slot.pieces:
            if piece.module in adapter.trained:
                ranks[slot.kind].add(adapter.trained[piece.module].rank)
    for kind, found in ranks.items():
        if len(found) > 1:
            raise OnnxError(f"{adapter.path}: layers of kind {kind} have ranks {sorted(found)}, the graph takes one")
    return {kind: next(iter(found)) for kind, found in ranks.items()}


def check_base(plan: MergePlan, signature: Signature, graph: Path) -> None:
    """Raise OnnxError unless the graph was made from the base that the adapter was trained on."""
    missing = [name for name in signature.tensors if name not in plan.base.tensors]
    if not missing:
        found = fingerprint(WeightRows(plan.base, name) for name in signature.tensors)
        if found == signature.fingerprint:
            return _check_saved(plan, signature, graph)
    raise OnnxError(
        f"{graph}: was made from {signature.base}, whose weights are not those of {plan.base.location}, the base of "
        f"{plan.adapter.path}; export a graph of that base"
    )


def _check_saved(plan: MergePlan, signature: Signature, graph: Path) -> None:
    saved = saved_digests(plan)
    other = [
        name
        for name in {**saved, **signature.saved}
        if saved.get(name) != signature.saved.get(name) and not _is_the_bases(plan, name, saved, signature.saved)
    ]
    if other:
        raise OnnxError(
            f"{graph}: adapters swap shards, but {plan.adapter.path} and the graph differ in whole trained tensors "
            f"({listed(sorted(other))}); export a graph of this adapter"
        )


def _is_the_bases(plan: MergePlan, name: str, *digests: Mapping[str, str]) -> bool:
    """Whether those that have this tensor have the base's values of it, and so trained nothing in it."""
    values = base_values(plan, name)
    own = None if values is None else digest(values)
    return own is not None and all(one.get(name, own) == own for one in digests)


def write_adapter(path: Path, arrays: Mapping[str, Array], signature: Signature) -> None:
    """Write an adapter file. Raises OSError when it cannot be written."""
    path.open("wb").close()  # ONNX Runtime does not say why it cannot
    ort = required("onnxruntime")
    onnx = required("onnx")
    kinds = signature.inputs
    values = {name: _ort_value(ort, array, getattr(onnx.TensorProto, kinds[name])) for name, array in arrays.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(signature.version)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path.absolute()))
    except RuntimeError as problem:  # ONNX Runtime's, whatever the system said
        raise OSError(
            errno.EIO, f"ONNX Runtime could not write it ({str(problem).splitlines()[-1][-200:]})"
        ) from problem


def _names(adapter: Adapter, signature: Signature) -> dict[str, str]:
    """The adapter's name of each module of the graph that it trained."""
    known = {piece.module for slot in signature.slots for piece in slot.pieces}
    by_layer: dict[str, list[str]] = {}
    for module in known:
        by_layer.setdefault(_in_layer(module), []).append(module)
    found: dict[str, str] = {}
    for module in adapter.trained:
        # Another version of transformers may have another name for what the layers are in.
        alike = [module] if module in known else by_layer.get(_in_layer(module), [])
        if len(alike) == 1 and alike[0] not in found.values():
            found[module] = alike[0]
    missing = [module for module in adapter.trained if module not in found]
    if missing:
        raise OnnxError(
            f"{adapter.path}: the graph has no inputs for {listed(missing)}; export the swappable graph with an "
            "adapter that trains all modules you want to swap"
        )
    return {module: name for name, module in found.items()}


def _in_layer(module: str) -> str:
    """A module's name from the list on that numbers the layers."""
    match = re.search(r"[^.]+\.\d+\..+$", module)
    return match[0] if match else module


def _rounded(adapter: Adapter, slot: Slot, name: str, values: Array) -> Array:
    return round_to(values, slot.dtype, f"{adapter.path}: {name}")


def _ort_value(ort: Any, array: Array, kind: int) -> Any:
    array = np.ascontiguousarray(array)
    if array.dtype.kind != "f":  # ml_dtypes' bfloat16, which NumPy does not know
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), kind)
    return ort.OrtValue.ortvalue_from_numpy(array)
