"""LoRA on repeated layers: the merged model has layers of their own, and answers as the live one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import edit_json, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places_tools import SMALL, Scene, edit_weights, saved, scene
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaModel

from fossil_export import convert, load_adapter, merge, plan_merge, verify
from fossil_export.errors import AdapterError, FossilExportError, MergeError, OnnxError
from fossil_export.merging._replication import ALIKE, TYPED
from fossil_export.onnx._refusals import check_mode

FOUR = SMALL | {"num_hidden_layers": 4}
QV = ["q_proj", "v_proj"]


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(FOUR | more)))


def replicated(folder: Path, model: Any, ranges: list[list[int]], **config: Any) -> Scene:
    """What PEFT trains on repeated layers; the live model's config gets a type for each of them, which it lacks."""
    found = scene(folder, model, layer_replication=ranges, **{"target_modules": QV, **config})
    own = found.live.get_base_model().config
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[:1] * own.num_hidden_layers
    return found


CLASSES = {
    "cohere": "Cohere", "gemma": "Gemma", "granite": "Granite", "llama": "Llama", "mistral": "Mistral", "olmo": "Olmo",
    "olmo2": "Olmo2", "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3", "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}  # fmt: skip


def test_every_type_that_is_taken_is_tried() -> None:
    assert {*CLASSES, "bert"} == {*ALIKE, *TYPED}


@pytest.mark.parametrize("name", list(CLASSES))
def test_every_type_whose_layers_are_alike(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{CLASSES[name]}Config")
    more = {"head_dim": 8} if name in ("gemma", "qwen3") else {"pad_token_id": 0} if name == "phi3" else {}
    model = getattr(transformers, f"{CLASSES[name]}ForCausalLM")(config(**FOUR, **more))
    targets = ["qkv_proj"] if name == "phi3" else QV
    found = replicated(tmp_path, model, [[0, 3], [1, 4]], target_modules=targets)
    result = found.merge()
    written = json.loads((found.merged / "config.json").read_text())
    assert written["num_hidden_layers"] == 6 and len(written.get("layer_types") or range(6)) == 6
    assert result.plan.config_edits.keys() <= {"num_hidden_layers", "layer_types"}


@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda one: one[0] < one[1]), min_size=1, max_size=3
    )
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_layer_has_the_values_of_its_source(
    ranges: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    saved(llama(), folder, max_shard_size="30KB")  # a file may hold layers alone that are left out
    found = replicated(folder, llama(), [list(one) for one in ranges])
    found.merge()
    before, after = weights(found.base), weights(found.merged)
    sources = [number for start, stop in ranges for number in range(start, stop)]
    for number, source in enumerate(sources):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert after[name.format(number)].equal(before[name.format(source)])
    layers = {name.split(".")[2] for name in after if ".layers." in name}
    assert layers == {str(number) for number in range(len(sources))}
    index = found.merged / "model.safetensors.index.json"
    if index.is_file():
        assert set(json.loads(index.read_text())["weight_map"]) == after.keys()


def test_modules_that_were_saved_whole_lie_in_their_own_layers(tmp_path: Path) -> None:
    found = replicated(tmp_path, llama(), [[0, 4], [2, 4]], modules_to_save=["lm_head", "input_layernorm"])
    assert found.merge().plan.count("replace") == 7


def test_base_models_and_encoders(tmp_path: Path) -> None:
    replicated(tmp_path / "bare", LlamaModel(LlamaConfig(**FOUR)), [[0, 3], [1, 4]]).merge()
    sizes = {name: size for name, size in FOUR.items() if name != "num_key_value_heads"}
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64))
    replicated(
        tmp_path / "bert", model, [[0, 3], [1, 4]], target_modules=["query", "value"], task_type="SEQ_CLS"
    ).merge()


def test_a_plan_may_be_made_again_in_another_dtype(tmp_path: Path) -> None:
    found = replicated(tmp_path, llama(), [[0, 4], [2, 4]])
    plan = plan_merge(found.adapter, dtype="bfloat16")
    assert len([tensor for tensor in plan.tensors if "q_proj" in tensor.name]) == 6
    merge(found.adapter, found.merged, dtype="bfloat16", max_shard_size="40KB")
    assert verify(found.merged, level="weights").parity


def test_a_wrong_value_in_a_layer_that_was_made_is_found(tmp_path: Path) -> None:
    found = replicated(tmp_path, llama(), [[0, 4], [2, 4]])
    found.merge()

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.5.mlp.up_proj.weight"][3, 3] += 1

    edit_weights(found.merged, change)
    assert any("layers.5.mlp.up_proj" in line for line in verify(found.merged, level="weights").problems)


@pytest.mark.parametrize(
    "ranges, error, why",
    [
        ([[0, 5]], MergeError, "the base has 4 layers"),
        ([[-1, 2]], MergeError, "the base has 4 layers"),
        ([[2, 2]], MergeError, "the base has 4 layers"),
        ([[0, 2]], MergeError, "has no weights for"),
        ([], MergeError, "has no weights for"),
        ([0, 4], AdapterError, "expected a list of pairs"),
        ([[0.5, 4]], AdapterError, "expected a list of pairs"),
    ],
)
def test_ranges_that_the_base_does_not_have_are_refused(
    ranges: Any, error: type[FossilExportError], why: str, tmp_path: Path
) -> None:
    found = replicated(tmp_path, llama(), [[0, 4], [2, 4]])
    edit_json(found.adapter / "adapter_config.json", layer_replication=ranges)
    with pytest.raises(error, match=why):
        merge(found.adapter, found.merged)


def test_bases_whose_layers_cannot_be_renumbered_are_refused(tmp_path: Path) -> None:
    found = replicated(tmp_path, llama(), [[0, 4], [2, 4]])
    for edits, why in {
        (("model_type", "diffllama"),): "may have other numbers is not known",
        (("layer_types", ("full_attention", "sliding_attention") * 2),): "several types",
        (("model_type", "qwen2"), ("use_sliding_window", True)): "several types",
        (("num_hidden_layers", 3),): "holds 4 of 3 layers|the base has 3 layers",
    }.items():
        path = found.base / "config.json"
        before = path.read_text()
        edit_json(path, **{key: list(value) if isinstance(value, tuple) else value for key, value in edits})
        with pytest.raises(MergeError, match=why):
            merge(found.adapter, found.merged)
        path.write_text(before)


def test_only_a_merge_makes_the_layers(tmp_path: Path) -> None:
    found = replicated(tmp_path, llama(), [[1, 4], [0, 1]])  # as many layers as before, in another order
    with pytest.raises(OnnxError, match="layer_replication"):
        check_mode(load_adapter(found.adapter), "merged")
    for kind in ("lora", "gguf-lora"):
        with pytest.raises(FossilExportError, match="layer_replication"):
            convert(found.adapter, tmp_path / kind, to=kind, base=found.base)  # type: ignore[arg-type]


def test_adapters_of_other_layers_are_not_added_up(tmp_path: Path) -> None:
    found = replicated(tmp_path / "a", llama(), [[0, 4], [2, 4]])
    other = scene(tmp_path / "b", llama(), target_modules=QV)
    with pytest.raises(MergeError, match="other layers of the base"):
        merge([found.adapter, other.adapter], tmp_path / "out", base=found.base)
