"""LoRA's other variants in PEFT: merged if the live model is a matrix, refused by name if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base, peft_merged, randomise, weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from verify_tools import flip, tamper

from fossil_export import convert, load_adapter, merge, verify
from fossil_export.errors import AdapterError

TOKENS = torch.arange(20)[None]
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["q_proj", "up_proj"], target_modules_bd_b=["o_proj"], nblocks=4, match_strict=False
)
TARGETS = ["q_proj", "up_proj", "o_proj", "v_proj"]


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_diagonal_factors_are_spread(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_bdlora=BLOCKS, target_modules=TARGETS, lora_alpha=12)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert load_adapter(tmp_path / "adapter").variant == "bdlora"
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "adapter", dtype)
    # With such a base PEFT's merge rounds the update before it is added, which the live model does not.
    assert dtype == torch.bfloat16 or all(torch.equal(value, theirs[key]) for key, value in ours.items())
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    apart = (answers(merged) - answers(live)).norm() / answers(live).norm()
    assert float(apart) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert verify(tmp_path / "merged", level="weights").parity
    tamper(
        tmp_path / "merged", "model.layers.1.self_attn.o_proj.weight", lambda old: flip(old.bfloat16()).to(old.dtype)
    )
    assert len(verify(tmp_path / "merged", level="weights").problems) == 1


def test_its_lora_is_exact(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_bdlora=BLOCKS, target_modules=TARGETS)
    found = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    assert found.details["exact"]
    merge(tmp_path / "adapter", tmp_path / "one")
    merge(tmp_path / "lora", tmp_path / "other")
    other = weights(tmp_path / "other")
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, other[key], rtol=1e-6, atol=1e-8)
    assert verify(tmp_path / "lora").parity


@pytest.mark.parametrize(
    "said, why",
    [
        ({"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 4}, "do not go together"),
        ({"target_modules_bd_a": ["q_proj"], "nblocks": 0}, "use_bdlora is"),
        ({"target_modules_bd_b": ["q_proj"], "nblocks": 4}, "do not go together"),
        ("yes", "use_bdlora is"),
    ],
)
def test_blocks_that_the_config_contradicts_are_refused(said: Any, why: str, tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, use_bdlora=BLOCKS, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", use_bdlora=said)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["random", "batch_average_once"])
def test_velora_is_a_plain_lora_but_for_its_gradients(init: Any, tmp_path: Path, base: Path) -> None:
    config = VeloraConfig(num_groups=4, init_type=init)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, velora_config=config, target_modules=QV)
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(tmp_path / "merged").items())
    assert verify(tmp_path / "merged", level="weights").parity


def test_what_velora_saves_belongs_to_velora(tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=QV)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_velora_embed"] = torch.zeros(12)
    save_file(state, path)
    with pytest.raises(AdapterError, match="velora"):
        load_adapter(tmp_path / "adapter")


def test_monteclora_is_live_what_its_factors_are(tmp_path: Path, base: Path) -> None:
    from peft.tuners.lora.config import MontecloraConfig

    settings: dict[str, Any] = {"monteclora_config": MontecloraConfig(), "target_modules": QV}
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **settings)
    assert any("sampler" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = peft_merged(base, tmp_path / "adapter", torch.float32)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(tmp_path / "merged").items())
    merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((merged - answers(trained)).norm() / merged.norm()) < 1e-6
    assert verify(tmp_path / "merged", level="weights").parity
    edit_json(tmp_path / "adapter" / "adapter_config.json", monteclora_config=None)
    with pytest.raises(AdapterError, match="monteclora_config"):
        load_adapter(tmp_path / "adapter")


def test_lora_in_a_multihead_attention_is_refused_because_peft_adds_a_part_of_it_twice(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.attention(x, x, x)[0]
            return found

    torch.manual_seed(0)
    model = Model().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["attention"]))
    randomise(peft_model)
    peft_model.eval().save_pretrained(tmp_path / "adapter")
    inputs = torch.randn(1, 5, 16, dtype=torch.float64)
    live = peft_model(inputs)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def update(module: str) -> torch.Tensor:
        up, down = (state[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "BA")
        return up @ down * 2

    before["attention.in_proj_weight"] += update("attention")
    before["attention.out_proj.weight"] += 2 * update("attention.base_layer.out_proj")
    plain = Model().double().eval()
    plain.load_state_dict(before)
    torch.testing.assert_close(plain(inputs), live, rtol=1e-9, atol=1e-9)
    with pytest.raises(AdapterError, match=r"MultiheadAttention.*out_proj twice.*merge_and_unload"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "field, why",
    [
        ({"alora_invocation_tokens": [1, 2]}, "depends on the tokens"),
        ({"arrow_config": {"top_k": 2}}, "depends on the tokens"),
        ({"use_qalora": True}, "GPTQ"),
    ],
)
def test_what_is_no_matrix_is_refused(field: dict[str, Any], why: str, tmp_path: Path, base: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=QV)
    edit_json(tmp_path / "adapter" / "adapter_config.json", **field)
    with pytest.raises(AdapterError, match=f"{next(iter(field))}.*{why}"):
        load_adapter(tmp_path / "adapter")


def test_an_out_proj_that_an_attention_of_pytorch_never_calls_is_left_out(tmp_path: Path) -> None:
    """SigLIP's head is an nn.MultiheadAttention, which computes with the weight of its `out_proj` itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    SiglipVisionModel(config).save_pretrained(tmp_path / "base")
    live = make_adapter(
        tmp_path / "adapter", tmp_path / "base", kind=LoraConfig, target_modules=["out_proj"], bias="all",
        model_class=SiglipVisionModel,
    )  # fmt: skip
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert "head.attention.out_proj" in result.plan.warnings[0]
    pixels = torch.randn(1, 3, 16, 16)
    merged, plain = (SiglipVisionModel.from_pretrained(tmp_path / name).eval() for name in ("merged", "base"))
    wanted, found, before = (one(pixel_values=pixels).pooler_output for one in (live, merged, plain))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)
    assert verify(tmp_path / "merged", level="weights").parity
