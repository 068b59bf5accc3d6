"""What the tests of PEFT's tuners share: bases with biases and convolutions, the live model as the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import edit_json, make_adapter, peft_merged, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fossil_export import merge, verify

Tensors = dict[str, torch.Tensor]


def biased_base(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A tiny Qwen2, whose q, k and v have biases, of random values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **{
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 90, "tie_word_embeddings": False, **sizes,
        }
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            value.data = torch.randn(value.shape)
    model.to(dtype).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 27).reshape(2, 12)).logits
    return found


def assert_live(base: Path, folder: Path, live: PeftModel | None = None, **config: Any) -> Tensors:
    """Merged into a float64 base, an adapter is the live model to float64's own rounding, and `verify` says so.

    Without `live`, the adapter is made of `config`. Returns the merged weights.
    """
    live = make_adapter(folder / "adapter", base, **config) if live is None else live
    merge(folder / "adapter", folder / "merged")
    ours = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    truth, found, before = logits(live), logits(ours), logits(plain)
    assert truth.dtype == torch.float64 and (truth - before).abs().max() > 1e-5, "nothing was trained"
    assert torch.allclose(found, truth, rtol=0, atol=1e-11 * float(truth.abs().max())), (found - truth).abs().max()
    assert verify(folder / "merged", level="weights").parity
    return weights(folder / "merged")


def not_rounded(ours: Tensors, truth: Tensors) -> list[str]:
    """Tensors with a value that is further from the truth than half a step and what a sum in float32 may be off."""
    found = []
    for name, value in ours.items():
        wide, numbers = truth[name].double(), torch.finfo(value.dtype)
        step = numbers.eps * wide.abs().clamp(min=numbers.smallest_normal)
        if ((value.double() - wide).abs() > 0.501 * step + 2.0**-21 * wide.abs().max()).any():
            found.append(name)
    return found


def assert_rounded(base: Path, folder: Path, dtype: torch.dtype, bits: bool = False, **config: Any) -> None:
    """Merged into a base of `dtype`, an adapter is the float64 truth rounded once, and `verify` says so.

    The truth is what PEFT merges in float64, which `assert_live` compares with the live model. In float32, whose sums
    are rounded too, only `verify` judges. With `bits` PEFT's own merge in `dtype` is the same to the bit.
    """
    make_adapter(folder / "adapter", base, **config)
    merge(folder / "adapter", folder / "merged")
    ours = weights(folder / "merged")
    changed = {name for name, value in weights(base).items() if not torch.equal(value, ours[name])}
    assert changed
    if dtype != torch.float32:
        truth = peft_merged(base, folder / "adapter", torch.float64)
        assert not_rounded(ours, truth) == []
    if bits:
        theirs = peft_merged(base, folder / "adapter", dtype)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert verify(folder / "merged", level="weights").parity


def assert_caught(folder: Path, name: str, steps: int = 8) -> None:
    """One wrong value in the merged folder is found, so many steps of its dtype from the right one."""
    from safetensors.torch import load_file, save_file

    file = next(one for one in folder.glob("*.safetensors") if name in load_file(one))
    tensors = load_file(file)
    whole = tensors[name].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[name].element_size()])
    place = int(tensors[name].abs().flatten().argmax())
    whole.view(-1)[place] += steps
    save_file(tensors, file, {"format": "pt"})
    report = verify(folder, level="weights")
    assert not report.parity, name


def set_config(folder: Path, **fields: Any) -> None:
    edit_json(folder / "adapter_config.json", **fields)
