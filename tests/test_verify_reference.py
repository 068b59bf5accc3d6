"""What verification computes a second time on its own, against its definition and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fossil_export import load_adapter, merge, verify
from fossil_export.adapters import Trained
from fossil_export.verifying._layers import TrainedLinear, attach
from fossil_export.verifying._sum import Sum
from fossil_export.verifying.reference import EXACT
from fossil_export.verifying.reference._ulp import ulp


@pytest.mark.parametrize("variant", ["tile", "ragged", "mini", "bat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_layers_are_pefts(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    options: dict[str, Any] = {"tile": {}, "ragged": {"r": 7}, "mini": {"init_weights": "mini", "mini_r": 8}}.get(
        variant, {"init_weights": "bat"}
    )
    trained = make_adapter(tmp_path / "adapter", base, **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    attach(model, Sum.of(load_adapter(tmp_path / "adapter")), torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits.float(), trained(tokens).logits.float()
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["F32", "F16", "BF16"]))
def test_steps_are_the_distance_to_the_neighbour(seed: int, dtype: str) -> None:
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal(50) * 10.0 ** rng.integers(-6, 4, 50)).to(kind).abs()
    integers = values.view(torch.int16 if kind != torch.float32 else torch.int32)
    above = (integers + 1).view(kind).double() - values.double()
    exact = values.double().numpy()
    assert np.array_equal(ulp(exact, dtype, np.empty_like(exact)), above.numpy())


@pytest.mark.parametrize("variant", ["tile", "mini", "bat"])
def test_reconstruction_is_the_definition(variant: str) -> None:
    """Against the formula written element by element."""
    rng = np.random.default_rng(0)
    rank, out, width = 4, 12, 8 if variant == "bat" else 10
    weight = rng.standard_normal((out, width))
    shard = rng.standard_normal({"tile": (rank, out), "mini": (rank, 6), "bat": (out // rank, rank, rank)}[variant])
    exact = np.empty_like(weight)
    arrays = {"B" if variant == "bat" else "D": shard}
    EXACT[variant].rebuild(weight, EXACT[variant].part(arrays, 0, out), {"r": rank}, exact)
    for o in range(out):
        for j in range(width):
            if variant == "bat":
                b, i, a, k = o // rank, o % rank, j // rank, j % rank
                block = weight[o, a * rank : (a + 1) * rank]
                want = weight[o, j] + sum(block[m] * shard[b, m, k] for m in range(rank)) + shard[b, i, k]
            else:
                want = weight[o, j] + shard[j % rank, o % shard.shape[1]]
            assert exact[o, j] == pytest.approx(want, abs=1e-12)


def test_an_unknown_variant_is_never_checked_by_another_ones_formula(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    loaded = load_adapter(adapter)
    trained = {module: replace(one, method="new") for module, one in loaded.trained.items()}
    with pytest.raises(KeyError, match="new"):
        verify(tmp_path / "merged", adapter=replace(loaded, trained=trained), level="weights")
    with pytest.raises(KeyError, match="new"):
        EXACT["new"]
    with pytest.raises(KeyError, match="new"):
        TrainedLinear(torch.nn.Linear(8, 8), ({"D": torch.zeros(4, 8)}, Trained("a", "new", {}), 1.0))
