"""LoRA of parameters, experts above all, is what the live model computes, however the files hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import edit_json, weights
from peft import LoraConfig, PeftModel
from places_tools import SMALL, Scene, answer, edit_weights, opened, saved, scene
from safetensors.torch import save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from fossil_export import convert, load_adapter, merge, verify
from fossil_export.adapters._parameters import ORDER
from fossil_export.errors import AdapterError, FossilExportError, MergeError, OnnxError
from fossil_export.merging._parameters import TRANSPOSED
from fossil_export.onnx._refusals import check_mode

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
SQUARE = SMALL | {"intermediate_size": 32}


def mixtral(**more: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**(SMALL | MOE | more)))


def gpt_oss(**more: Any) -> Any:
    return GptOssForCausalLM(GptOssConfig(**(SMALL | MOE | {"head_dim": 8} | more)))


def qwen3() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=20, num_experts=3, num_experts_per_tok=2, head_dim=8)
    )


def qwen3_vl(inner: int) -> Any:
    text = {"moe_intermediate_size": inner, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    rope = {"rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(
        text_config=SMALL | text | rope,
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )
    return Qwen3VLMoeForConditionalGeneration(config)


def llama4() -> Any:
    sizes = {"intermediate_size_mlp": 40, "head_dim": 8, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, **sizes, num_local_experts=3, num_experts_per_tok=1))


def jetmoe() -> Any:
    sizes = {name: size for name, size in SMALL.items() if name != "num_attention_heads"}
    return JetMoeForCausalLM(JetMoeConfig(**sizes, **MOE, kv_channels=8))


def granite() -> Any:
    return GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, **MOE))


Make = Callable[[], Any]
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "both": (mixtral, {"target_parameters": EXPERTS}),
    "one of them": (mixtral, {"target_parameters": ["down_proj"], "target_modules": ["q_proj"]}),
    "names of old modules": (mixtral, {"target_modules": ["w1", "w2", "w3", "gate", "q_proj"]}),
    "patterns": (
        mixtral,
        {
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.gate_up_proj": 2},
            "alpha_pattern": {".*down_proj": 3},
            "use_rslora": True,
        },
    ),
    "square": (lambda: mixtral(**SQUARE), {"target_parameters": EXPERTS}),
    "one expert": (lambda: mixtral(num_local_experts=1, num_experts_per_tok=1), {"target_parameters": EXPERTS}),
    "router too": (qwen3, {"target_parameters": [*EXPERTS, "gate.weight"]}),
    "transposed": (gpt_oss, {"target_parameters": EXPERTS}),
    "square, transposed": (lambda: gpt_oss(**SQUARE), {"target_parameters": EXPERTS}),
    "four levels": (
        gpt_oss,
        {"target_parameters": [*EXPERTS, "gate_up_proj_bias", "down_proj_bias", "router.weight"]},
    ),
    "inputs first, not transposed": (llama4, {"target_parameters": EXPERTS}),
    "one parameter": (granite, {"target_parameters": ["gate_up_proj"]}),
    "weights of three dimensions": (jetmoe, {"target_parameters": ["input_linear.weight", "output_linear.weight"]}),
    "vision and language": (lambda: qwen3_vl(20), {"target_parameters": EXPERTS}),
}
BY_EXPERT = ("both", "names of old modules", "patterns", "router too", "square")


@pytest.mark.parametrize("name", list(CASES))
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    model = make()
    saved(model, tmp_path, save_original_format=False)
    scene(tmp_path, model, **{"target_modules": [], **config}).merge()


@pytest.mark.parametrize("name", BY_EXPERT)
def test_experts_by_name(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    model = make()
    base = saved(model, tmp_path, save_original_format=True)
    assert any(".experts.2." in stored for stored in weights(base))
    scene(tmp_path, model, **{"target_modules": [], **config}).merge()


@pytest.mark.parametrize("inner", [20, 16])
def test_experts_that_the_files_hold_transposed(inner: int, tmp_path: Path) -> None:
    """As Qwen3-VL's on the Hub: the class transposes them unless their shape is its own, which a square one has."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [one for one in tensors if "mlp.experts" in one]:
            tensors[name] = tensors[name].transpose(1, 2)

    model = qwen3_vl(inner)
    edit_weights(saved(model, tmp_path), turn)
    scene(tmp_path, model, target_modules=[], target_parameters=EXPERTS).merge()


@pytest.mark.parametrize("tie", [False, True])
def test_weights_of_plain_layers(tie: bool, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tie))
    found = scene(tmp_path, model, target_modules=[], target_parameters=["q_proj.weight", "lm_head.weight"])
    assert found.merge().plan.count("merge") == 3
    assert json.loads((found.merged / "config.json").read_text())["tie_word_embeddings"] is False


def test_rows_of_tokens_beside_experts(tmp_path: Path) -> None:
    model = mixtral()
    saved(model, tmp_path, save_original_format=False)
    config = {"target_parameters": ["down_proj"], "trainable_token_indices": [3, 4, 9]}
    assert scene(tmp_path, model, target_modules=[], **config).merge().plan.count("replace") == 1


def test_bfloat16_experts_are_rounded_once(tmp_path: Path) -> None:
    model = mixtral().bfloat16()
    base = saved(model, tmp_path, save_original_format=False)
    found = scene(tmp_path, model, target_modules=[], target_parameters=EXPERTS)
    merge(found.adapter, found.merged, base=base)
    live = PeftModel.from_pretrained(opened(found.kind, base), found.adapter).merge_and_unload()
    for name, value in weights(found.merged).items():
        wanted = live.state_dict()[name]
        assert torch.equal(value, wanted.bfloat16()) or (value != wanted.bfloat16()).double().mean() < 1e-3, name
    assert verify(found.merged, level="weights").parity


@pytest.mark.parametrize("fused", [False, True])
def test_a_wrong_value_of_one_expert_is_found(fused: bool, tmp_path: Path) -> None:
    model = mixtral()
    saved(model, tmp_path, save_original_format=not fused)
    found = scene(tmp_path, model, target_modules=[], target_parameters=EXPERTS)
    found.merge()
    (name, *_) = (one for one in weights(found.merged) if "down_proj" in one or ".2.w2." in one)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] += 0.5

    edit_weights(found.merged, change)
    assert any(name in line for line in verify(found.merged, level="weights").problems)


def old_adapter(folder: Path, base: Path) -> Path:
    """An adapter of Mixtral as transformers 4 had it: a LoRA for every expert's layer."""
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for name, (inputs, outputs) in {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora"
                tensors[f"{key}_A.weight"] = torch.randn(4, inputs) * 0.05
                tensors[f"{key}_B.weight"] = torch.randn(outputs, 4) * 0.05
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return folder


def test_an_adapter_of_transformers_4_is_merged_by_names_or_refused(tmp_path: Path) -> None:
    base = saved(mixtral(), tmp_path, save_original_format=True)
    adapter = old_adapter(tmp_path / "adapter", base)
    live = PeftModel.from_pretrained(opened(MixtralForCausalLM, base), adapter).eval()
    merge(adapter, tmp_path / "merged")
    wanted = answer(live.double())
    torch.testing.assert_close(answer(opened(MixtralForCausalLM, tmp_path / "merged")), wanted, rtol=0, atol=2e-6)
    fused = saved(mixtral(), tmp_path / "fused", save_original_format=False)
    with pytest.raises(MergeError, match=r"has no weights for .*experts\.0\.w1"):
        merge(adapter, tmp_path / "other", base=fused)


@pytest.fixture
def fused(tmp_path: Path) -> Scene:
    model = mixtral()
    saved(model, tmp_path, save_original_format=False)
    return scene(tmp_path, model, target_modules=[], target_parameters=EXPERTS)


def drop(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [one for one in tensors if any(part in one for part in parts)]:
            del tensors[name]

    return change


def test_what_is_missing_or_does_not_go_together_is_refused(fused: Scene) -> None:
    config, whole = fused.adapter / "adapter_config.json", weights(fused.adapter)
    for change, why in {
        drop("layers.0.mlp.experts.lora_A"): "lora_A is missing",
        drop("layers.0.mlp.experts.lora_"): "some are missing",
        drop("layers.0.mlp.experts.base_layer"): "which these are cannot be told|made for",
    }.items():
        edit_weights(fused.adapter, change)
        with pytest.raises(FossilExportError, match=why):
            merge(fused.adapter, fused.merged)
        save_file(whole, fused.adapter / "adapter_model.safetensors")
    for edits, why in {
        (("r", 5),): "no multiple of r=5",
        (("target_parameters", ("mlp.gate_up_proj", "experts.down_proj")),): "which these are cannot be told",
        (("target_parameters", ("gate_up_proj", "up_proj", "down_proj")),): "which these are cannot be told",
        (("target_parameters", ("experts.first", "experts.second")),): "order in the model is not known",
        (("target_parameters", ("experts.gate_up_proj", "experts.up_proj")),): "has no weights for",
        (("target_parameters", ("experts.down_proj", "experts.w2")),): "has no weights for",
        (("target_parameters", "down_proj"),): "expected a list of names",
        (("target_parameters", None),): "has rank 12, but the config says r=4",
    }.items():
        before = config.read_text()
        edit_json(config, **{key: list(value) if isinstance(value, tuple) else value for key, value in edits})
        with pytest.raises(FossilExportError, match=why):
            merge(fused.adapter, fused.merged)
        config.write_text(before)


def test_another_number_of_experts_is_refused(fused: Scene, tmp_path: Path) -> None:
    other = saved(mixtral(num_local_experts=4), tmp_path / "other", save_original_format=False)
    with pytest.raises(MergeError, match="made for 3 times"):
        merge(fused.adapter, fused.merged, base=other)


def test_square_matrices_of_an_older_peft_are_refused_unless_both_had_them_alike(tmp_path: Path) -> None:
    for make, right in ((mixtral, False), (gpt_oss, True)):
        folder = tmp_path / str(right)
        model = make(**SQUARE)
        saved(model, folder, save_original_format=False)
        found = scene(folder, model, target_modules=[], target_parameters=["experts.down_proj"])
        edit_json(found.adapter / "adapter_config.json", peft_version="0.17.1")
        if right:
            found.merge()
        else:
            with pytest.raises(MergeError, match="older PEFT"):
                merge(found.adapter, found.merged)


def test_experts_are_no_branch(fused: Scene) -> None:
    with pytest.raises(OnnxError, match="lora_parameter"):
        check_mode(load_adapter(fused.adapter), "merged")
    with pytest.raises(FossilExportError):
        convert(fused.adapter, fused.folder / "out", to="lora", base=fused.base)


def test_a_module_and_its_parameter_cannot_both_be_meant(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    found = scene(tmp_path, model, target_modules=["q_proj"])
    edit_json(found.adapter / "adapter_config.json", target_parameters=["q_proj.weight"])
    found.merge()  # the module's own LoRA, whose rank is looked up by its name
    edit_json(found.adapter / "adapter_config.json", target_modules=["k_proj"], target_parameters=["v_proj.weight"])
    with pytest.raises(AdapterError, match="does not cover"):
        load_adapter(found.adapter)


MODELING = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))


def test_transformers_has_the_parameters_of_experts_in_the_order_that_is_taken() -> None:
    seen = 0
    for path in MODELING:
        text = path.read_text(errors="ignore")
        for body in re.split(r"^class ", text, flags=re.M)[1:]:
            names = re.findall(r"^        self\.(\w+) = nn\.Parameter\(", body, flags=re.M)
            known = [name for name in dict.fromkeys(names) if name in ORDER]
            if len(known) > 1 and "xpert" in body.split("\n", 1)[0]:
                seen += 1
                assert known == sorted(known, key=ORDER.index), (path.name, known)
    assert seen > 30


def test_the_types_whose_experts_lie_transposed_are_those_of_transformers() -> None:
    found = {path.parent.name for path in MODELING if "is_transposed=True" in path.read_text(errors="ignore")}
    assert found == {name.removesuffix("_text") for name in TRANSPOSED}


def test_the_config_of_peft_is_what_is_read() -> None:
    assert {
        "target_parameters",
        "layer_replication",
        "trainable_token_indices",
    } <= LoraConfig.__dataclass_fields__.keys()
