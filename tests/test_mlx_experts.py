"""MLX's layers of experts, whose LoRA is one tensor for all of them; and its folders on the Hub and of whole VLMs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weights
from hub_tools import LoopbackHub
from safetensors.torch import save_file
from test_mlx import SHAPES, make_mlx, mlx_weight
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fossil_export import load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 90,
}  # fmt: skip
EXPERTS = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
KINDS = {
    "qwen": ("mlp.switch_mlp", "mlp.experts", dict(zip(EXPERTS, EXPERTS, strict=True))),
    "mixtral": (
        "block_sparse_moe.switch_mlp",
        "block_sparse_moe.experts",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
}


def make_moe(folder: Path, kind: str, **options: Any) -> None:
    torch.manual_seed(0)
    if kind == "qwen":
        config = Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=24, intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=8
        )
        Qwen3MoeForCausalLM(config).save_pretrained(folder, **options)
    else:
        MixtralForCausalLM(
            MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
        ).save_pretrained(folder, **options)  # fmt: skip


def make_switch(folder: Path, base: Path, layer: str, flat: bool = False) -> dict[str, torch.Tensor]:
    """What `LoRASwitchLinear` has: a (experts, r, in), at first (experts · r, in), and b (experts, out, r)."""
    make_mlx(folder, base, {}, scale=0.3)
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, (outputs, inputs) in EXPERTS.items():
        down = torch.randn(4, 4, inputs, generator=generator)
        found[f"model.layers.1.{layer}.{name}.lora_a"] = down.reshape(16, inputs) if flat else down
        found[f"model.layers.1.{layer}.{name}.lora_b"] = torch.randn(4, outputs, 4, generator=generator)
    save_file(found, folder / "adapters.safetensors")
    return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_expert_gets_its_own_update(kind: str, flat: bool, tmp_path: Path) -> None:
    layer, stored, names = KINDS[kind]
    make_moe(tmp_path / "base", kind)
    found = make_switch(tmp_path / "mlx", tmp_path / "base", layer, flat)
    result = merge(tmp_path / "mlx", tmp_path / "merged")
    assert result.plan.count("merge") == 12
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    for name, (outputs, inputs) in EXPERTS.items():
        down = found[f"model.layers.1.{layer}.{name}.lora_a"].reshape(4, 4, inputs).double()
        up = found[f"model.layers.1.{layer}.{name}.lora_b"].double()
        for expert in range(4):
            weight = f"model.layers.1.{stored}.{expert}.{names[name]}.weight"
            # gather_mm of the layer's forward pass, for the unit vectors and this expert alone.
            x = torch.eye(inputs, dtype=torch.float64)
            wanted = x @ before[weight].double().T + 0.3 * (
                (x @ down.swapaxes(-1, -2)[expert]) @ up.swapaxes(-1, -2)[expert]
            )
            assert after[weight].shape == (outputs, inputs)
            assert torch.allclose(after[weight].double(), wanted.T, atol=1e-6)
    assert verify(tmp_path / "merged", level="weights").parity


def test_a_base_with_fused_experts_is_refused(tmp_path: Path) -> None:
    make_moe(tmp_path / "base", "qwen", save_original_format=False)
    make_switch(tmp_path / "mlx", tmp_path / "base", "mlp.switch_mlp")
    with pytest.raises(MergeError, match=r"has no weights for model\.layers\.1\.mlp\.experts\.0"):
        merge(tmp_path / "mlx", tmp_path / "merged")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model.layers.1.moe.switch_mlp.up_proj.lora_a": torch.ones(4, 4, 32)}, "unknown what checkpoints call them"),
        ({"model.layers.1.mlp.switch_mlp.up_proj.lora_a": torch.ones(4, 3, 32)}, "do not go together"),
        ({"model.layers.1.mlp.switch_mlp.up_proj.lora_a": torch.ones(15, 32)}, "do not go together"),
        ({"model.layers.1.mlp.switch_mlp.up_proj.m": torch.ones(24)}, "not lora_a and lora_b"),
    ],
)
def test_experts_that_are_not_understood_are_refused(change: dict[str, torch.Tensor], why: str, tmp_path: Path) -> None:
    found = make_switch(tmp_path / "mlx", tmp_path / "base", "mlp.switch_mlp")
    save_file(found | change, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "mlx")


def test_the_text_model_of_a_vlm(tmp_path: Path) -> None:
    text = LlamaConfig(**SIZES | {"hidden_size": 48}, intermediate_size=96)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=3)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    module = "language_model.model.layers.0.self_attn.q_proj"
    found = make_mlx(tmp_path / "mlx", tmp_path / "base", {module: (48, 48)})
    merge(tmp_path / "mlx", tmp_path / "merged")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    (name,) = [name for name in before if not torch.equal(after[name], before[name])]
    assert name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name
    assert torch.allclose(after[name].double(), mlx_weight(module, before[name], found, 20.0), atol=1e-5)


def test_a_folder_on_the_hub(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    make_mlx(tmp_path / "mlx", models / "base", SHAPES)
    hosted.add_folder("ada/mlx", tmp_path / "mlx")
    merge("ada/mlx", tmp_path / "one", base=models / "base")
    merge(tmp_path / "mlx", tmp_path / "two")
    for file in (tmp_path / "two").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
