"""Single layers: trained by PEFT, merged on the CPU, on the device and by PEFT."""

from __future__ import annotations

import copy
import statistics
import time
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
    """A random linear layer (out, in) in PEFT's wrapper, its shard, in float32 as PEFT keeps it, trained a little.

    The weight depends on the seed, the dtype and the shape alone.
    """
    torch.manual_seed(SEED)
    kind = getattr(torch, dtype)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device=setup.device, dtype=kind).requires_grad_(False)
    linear.weight.normal_(std=0.02)
    # The constructor of PEFT's wrapper changes from release to release; this way in does not.
    holder = torch.nn.ModuleDict({"layer": linear})
    layer = inject_adapter_in_model(variant.config(target_modules=["layer"]), holder)["layer"]
    shard = layer.miss_block["default"]
    shard.data = shard.data.float()
    inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(kind)
    wanted = linear(inputs).float() + torch.randn(setup.tokens, shape[0], device=setup.device)
    optimizer = torch.optim.AdamW([shard], lr=setup.rate)
    for _ in range(setup.steps):
        optimizer.zero_grad()
        # A sum: the mean's gradients would be too small for float16.
        (layer(inputs).float() - wanted).square().sum().backward()
        optimizer.step()
    return layer


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
        weight, shard = stored(layer.base_layer.weight).copy(), stored(layer.miss_block["default"])
        outs, speeds = (np.empty_like(weight), np.empty_like(weight)), []
        with torch.no_grad(), threadpool_limits(1):
            engines: tuple[Engine, ...] = (NumpyEngine(), TorchEngine(setup.engine_device))
            for engine, out in zip(engines, outs, strict=True):
                _merge(engine, weight, shard, variant.method, out)
                if case.layer == TIMED:
                    speeds.append(_speed(engine, weight, shard, variant.method, out))
                engine.close()
        if not is_finite(shard) or not is_finite(outs[0]):
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


def _merge(engine: Engine, weight: Array, shard: Array, method: str, out: Array) -> None:
    arrays = {next(iter(METHODS[method].PEFT["MISS"].values())): engine.widen(shard, "F32")}
    merge_slab(engine, weight, out, [Update(METHODS[method], arrays, {})], 0, len(weight))


def _speed(engine: Engine, weight: Array, shard: Array, method: str, out: Array) -> float:
    """Bytes of weight a second, median of `REPEATS` merges with all transfers."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        _merge(engine, weight, shard, method, out)
        seconds.append(time.perf_counter() - started)
    return weight.nbytes / statistics.median(seconds)
