"""Bases whose tensors make one parameter together, and of which some are missing or not as they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from fossil_export import FossilExportError, merge, plan_merge

W1 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose experts are stored apart, and an adapter that saved them as the model has them."""
    folder = tmp_path_factory.mktemp("experts")
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    make_adapter(folder / "adapter", folder / "base", model_class=MixtralForCausalLM, r=4, **options)
    return folder


DAMAGE: dict[str, tuple[Callable[[Weights], object], str]] = {
    "a kind is missing": (lambda w: [w.pop(W1.format(n)) for n in (0, 1)], "tensors are missing"),
    "one is missing": (lambda w: w.pop(W1.format(1)), "tensors are missing"),
    "another shape": (lambda w: w.update({W1.format(1): torch.zeros(3, 32)}), "other shapes"),
    "a scalar": (lambda w: w.update({W1.format(1): torch.zeros(())}), "other shapes"),
    "integers": (lambda w: w.update({W1.format(1): w[W1.format(1)].to(torch.int8)}), "is I8"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_is_refused_in_one_line(what: str, experts: Path, tmp_path: Path) -> None:
    change, said = DAMAGE[what]
    (tmp_path / "config.json").write_bytes((experts / "base" / "config.json").read_bytes())
    stored = load_file(experts / "base" / "model.safetensors")
    save_file(stored, tmp_path / "model.safetensors")
    assert plan_merge(experts / "adapter", tmp_path)
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(FossilExportError) as refused:
        merge(experts / "adapter", tmp_path / "merged", base=tmp_path)
    assert said in str(refused.value) and "experts" in str(refused.value) and "\n" not in str(refused.value)
