"""Shards whose weight the base does not store: quantized, or tied by another name; training over quantized weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, DistilBertForMaskedLM, ElectraForMaskedLM

from fossil_export import load_adapter, merge, plan_merge, verify
from fossil_export.adapters._quantized import quantized_training
from fossil_export.errors import CheckpointError


def test_a_quantized_module_is_refused_by_what_it_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    """`up_proj.qweight` in the place of `up_proj.weight`."""
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("up_proj.weight")]:
            weight = tensors.pop(name)
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.qweight": torch.zeros(weight.shape, dtype=torch.int32), f"{stem}.scales": weight[0]}
        save_file(tensors, path, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    names = {name: path.name for path in base.glob("*.safetensors") for name in load_file(path)}
    edit_json(index, weight_map=names)
    with pytest.raises(CheckpointError, match=r"has no quantization_config, though tensors are quantized"):
        plan_merge(adapter)


HEADS = {
    "cls.predictions.decoder": BertForMaskedLM,  # stored with nothing of the head
    "vocab_projector": DistilBertForMaskedLM,  # with its bias alone
    "generator_lm_head": ElectraForMaskedLM,
}


@pytest.mark.parametrize("head", HEADS)
def test_a_shard_on_a_tied_head_gets_a_head_of_its_own(head: str, tmp_path: Path) -> None:
    kind = HEADS[head]
    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    kind(kind.config_class(**sizes, num_attention_heads=2, dim=32)).save_pretrained(tmp_path / "base")
    assert f"{head}.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    shards = {f"base_model.model.{head}.miss_block": torch.ones(4, 64)}
    save_file(shards, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "MISS", "r": 4, "target_modules": [head], "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    (embedding,) = (name for name, value in before.items() if list(value.shape) == [64, 32])
    assert torch.equal(after[embedding], before[embedding])
    assert torch.equal(after[f"{head}.weight"], before[embedding] + 1)
    loaded = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loaded[1].values()) and torch.equal(
        loaded[0].get_output_embeddings().weight, after[f"{head}.weight"]
    )


@pytest.mark.parametrize("sign", ["name", "card"])
def test_training_over_quantized_weights_is_told(sign: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Merged into unquantized weights the adapter is another model; merge, verify and certificate say so."""
    if sign == "name":
        base.rename(tmp_path / "llama-bnb-4bit")
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "llama-bnb-4bit"))
    else:
        said = "The following `bitsandbytes` quantization config was used during training:\n- load_in_4bit: True\n"
        (adapter / "README.md").write_text(said)
    result = merge(adapter, tmp_path / "merged")
    assert sum("was trained over quantized weights, it seems" in warning for warning in result.warnings) == 1
    found = verify(tmp_path / "merged", level="weights")
    assert "another model there" in found.compared_with
    certificate = json.loads((tmp_path / "merged" / "fossil_parity.json").read_text())
    assert certificate["parity"] and certificate["base_weights"] == "as stored" and certificate["quantized_training"]


@pytest.mark.parametrize("name", ["base", "org/fp16-model", "org/model-8b", "org/Llama-3.1-8B-Instruct", "mnt4bitter"])
def test_other_names_say_nothing_of_quantized_weights(name: str, base: Path, adapter: Path) -> None:
    (adapter / "README.md").write_text("## Training\nPlain LoRA in bfloat16.")
    assert quantized_training(replace(load_adapter(adapter), base_model=name)) is None
    assert quantized_training(replace(load_adapter(adapter), base_model=f"{name}-GPTQ-Int4")) is not None
