"""Single layers: trained by PEFT, merged on the CPU, on the device and by PEFT."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import inject_adapter_in_model
from threadpoolctl import threadpool_limits

from fossil_export.merging._engine import Engine, NumpyEngine, TorchEngine, Update, is_finite, merge_slab
from fossil_export.methods import METHODS
from gpu.cases import REPEATS, SEED, Case, LayerRow, Setup, Variant, blank
from gpu.tools import Array, Scratch, compare, relative, stored

TIMED = "gate, up"


def trained_layer(setup: Setup, variant: Variant, dtype: str, shape: tuple[int, int]) -> Any:
    """A random linear layer (out, in) in PEFT's wrapper, its adapter, in float32 as PEFT keeps it, trained a little.

    The weight depends on the seed, the dtype and the shape alone.
    """
    torch.manual_seed(SEED)
    kind = getattr(torch, dtype)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device=setup.device, dtype=kind).requires_grad_(False)
    linear.weight.normal_(std=0.02)
    # The constructor of PEFT's wrapper changes from release to release; this way in does not.
    holder = torch.nn.ModuleDict({"layer": linear})
    layer = inject_adapter_in_model(variant.config(target_modules=["layer"]), holder)["layer"]
    tensors = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(kind)
    wanted = linear(inputs).float() + torch.randn(setup.tokens, shape[0], device=setup.device)
    optimizer = torch.optim.AdamW(tensors, lr=setup.rate)
    for _ in range(setup.steps):
        optimizer.zero_grad()
        # A sum: the mean's gradients would be too small for float16.
        (layer(inputs).float() - wanted).square().sum().backward()
        optimizer.step()
    return layer


def adapter_of(layer: Any) -> dict[str, Any]:
    """What was trained, by the end of its key in PEFT's file."""
    named = (
        (name.replace(".default", ""), tensor) for name, tensor in layer.named_parameters() if tensor.requires_grad
    )
    # PEFT saves this one without its module's last name (peft/tuners/lora/dora.py).
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): tensor for name, tensor in named}


class Layers:
    """Makes the rows of single layers."""

    def __init__(self, setup: Setup, scratch: Scratch) -> None:
        self._setup = setup

    def row(self, case: Case) -> LayerRow:
        """Train one layer, merge it three times and compare."""
        setup, variant = self._setup, self._setup.variants[case.variant]
        row = blank(setup, case)
        assert isinstance(row, LayerRow)
        shape = setup.layer.layers[case.layer]
        layer = trained_layer(setup, variant, case.dtype, shape)
        weight = stored(layer.base_layer.weight).copy()
        trained = {name: stored(tensor) for name, tensor in adapter_of(layer).items()}
        outs, speeds = (np.empty_like(weight), np.empty_like(weight)), []
        with torch.no_grad(), threadpool_limits(1):
            engines: tuple[Engine, ...] = (NumpyEngine(), TorchEngine(setup.engine_device))
            for engine, out in zip(engines, outs, strict=True):
                _merge(engine, weight, trained, variant, out)
                if case.layer == TIMED:
                    speeds.append(_speed(engine, weight, trained, variant, out))
                engine.close()
        if not all(map(is_finite, trained.values())) or not is_finite(outs[0]):
            return replace(row, diverged=True)
        inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(getattr(torch, case.dtype))
        with torch.no_grad():
            truth = copy.deepcopy(layer).double()(inputs.double())
            trainer = relative(layer(inputs), truth)
            ours = torch.from_numpy(outs[1].view(f"i{weight.itemsize}")).view(inputs.dtype).to(setup.device)
            merged = relative(torch.nn.functional.linear(inputs, ours), truth)
            layer.merge()
        theirs = compare(outs[1], stored(layer.base_layer.weight))
        return replace(row, errors=((trainer, merged),), devices=compare(*outs), peft=theirs, speeds=tuple(speeds))

    def close(self) -> None:
        """Nothing is kept from row to row."""


def _merge(engine: Engine, weight: Array, trained: Mapping[str, Array], variant: Variant, out: Array) -> None:
    method, config = METHODS[variant.method], variant.config().to_dict()
    roles = method.PEFT[config["peft_type"].value]
    arrays = {roles[name]: engine.widen(array, "F32") for name, array in trained.items()}
    numbers = method.read(config, "layer", {role: array.shape for role, array in arrays.items()}, "layer")
    merge_slab(engine, weight, out, [Update(method, arrays, numbers or {})], 0, len(weight))


def _speed(engine: Engine, weight: Array, trained: Mapping[str, Array], variant: Variant, out: Array) -> float:
    """Bytes of weight a second, median of `REPEATS` merges with all transfers."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        _merge(engine, weight, trained, variant, out)
        seconds.append(time.perf_counter() - started)
    return weight.nbytes / statistics.median(seconds)
