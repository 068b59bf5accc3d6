"""What tests of methods share: the live trained model as the judge, a single PEFT layer, one damaged value."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from conftest import make_adapter, peft_merged, weights
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fossil_export import merge, verify

IDS = torch.arange(3, 23).reshape(2, 10)


def noise(model: torch.nn.Module, size: float = 0.3) -> None:
    """Stand in for training, with moves that no rounding hides."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            moved = torch.randn(parameter.shape, generator=generator) * size
            parameter.data += moved.to(parameter.dtype)


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def live(base: Path, adapter: Path) -> torch.Tensor:
    """What the trained model answers, unmerged, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    return answers(trained.double().eval())


def judge(folder: Path, base: Path, kind: Any, bits: bool = True, modules: int | None = None, **config: Any) -> None:
    """Train a `kind` on a float32 `base` and merge it: the merged model must answer as the live one, its weights must
    be those of PEFT's merge (to the bit, if `bits`), `verify` must agree, and see one damaged value."""
    config.setdefault("target_modules", ["q_proj", "v_proj", "down_proj"])
    make_adapter(folder / "adapter", base, noise, kind=kind, **config)
    result = merge(folder / "adapter", folder / "merged")
    assert result.plan.count("merge") == (modules or 2 * len(config["target_modules"]))

    before = answers(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    truth = live(base, folder / "adapter")
    ours = answers(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float64))
    moved = (truth - before).abs().max()
    assert moved > 1e-3
    assert (ours - truth).abs().max() < 2e-5 * max(1.0, float(moved)), float((ours - truth).abs().max())

    stored, theirs = weights(folder / "merged"), peft_merged(base, folder / "adapter", torch.float32)
    if bits:
        assert [key for key in stored if not torch.equal(stored[key], theirs[key])] == []
    else:
        for key, value in stored.items():
            torch.testing.assert_close(value, theirs[key], rtol=2e-5, atol=2e-6)
    assert verify(folder / "merged", level="weights").parity
    damage(folder / "merged", next(iter(result.survival)))
    assert not verify(folder / "merged", level="weights").parity


def damage(merged: Path, name: str) -> None:
    """Change one value of a tensor by a little more than rounding can."""
    for file in merged.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            value = tensors[name]
            at = value.abs().argmax()
            value.view(-1)[at] *= 1.0001
            save_file(tensors, file, metadata={"format": "pt"})
