"""Cards of LoRAs and other adapters tell of their own method, and a push of the trained folder itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from card_tools import CONFIGS, FILES, LORA, RECORD, facts, generated, local, metadata, snippets
from conftest import QV, edit_json, make_adapter, make_base
from loopback import LoopbackHub
from peft import LoraConfig
from push_tools import card_of, published
from test_card_snippets import save_tokenizer

from fossil_export import FossilExportError, convert, merge, push, verify
from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards import model_card
from fossil_export.cards._methods import method_of

WORDS = ("fossil](", "miss", "bone", "shard", "ammonite", "2409.15371")
# FOSSIL's own; the tool's name, fossil-export, is in every card.


def of_lora(kind: str, **changes: Any) -> Any:
    return facts(kind, record={**(facts(kind).record or {}), "adapter": LORA}, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_on_a_lora_says_nothing_of_fossil(kind: str) -> None:
    card = model_card(of_lora(kind))
    assert not [word for word in WORDS if word in card.lower().replace("mascot-miss", "")]
    assert {"lora", "peft", "fossil-export"} <= set(metadata(card)["tags"])
    assert not {"fossil", "miss", "tile"} & set(metadata(card)["tags"])
    assert "[LoRA](https://arxiv.org/abs/2106.09685)" in card and "@misc{hu2021lora," in card


@pytest.mark.parametrize("kind", KINDS)
def test_no_card_asks_about_the_demo(kind: str) -> None:
    for task in (None, "QUESTION_ANS", "SEQ_CLS"):
        assert "ammonite" not in model_card(facts(kind, config={"task_type": task}))
    assert "ammonite" not in model_card(facts(config={"architectures": ["BertForMaskedLM"]}))


def test_tags_of_a_lora_stand_once() -> None:
    assert metadata(model_card(of_lora("lora")))["tags"] == ["lora", "peft", "fossil-export"]
    assert metadata(model_card(of_lora("gguf-lora")))["tags"] == ["lora", "peft", "fossil-export", "gguf"]


def test_a_sum_of_two_methods_names_both() -> None:
    entries = [{**RECORD["adapter"], "weight": 1.0}, {**LORA, "weight": 0.5}]
    record = {key: value for key, value in RECORD.items() if key != "adapter"} | {"adapters": entries}
    card = model_card(facts(record=record, adapters=("ada/one", "ada/two"), certificate=None))
    assert {"fossil", "miss", "lora", "peft"} <= set(metadata(card)["tags"])
    assert "earlier Bone and DiSHA) and [LoRA](" in card and card.count("@misc{") == 2


@pytest.mark.parametrize(
    ("peft_type", "variant", "name", "tags"),
    [
        ("LORA", "lora+lora_embedding", "LoRA", ("lora", "peft")),
        ("LORA", "dora", "DoRA", ("dora", "lora", "peft")),
        ("LOHA", "loha", "LoHa", ("loha", "peft")),
        ("BONE", "bat", "FOSSIL", ("fossil", "miss")),
        ("RWKV", "tile", "FOSSIL", ("fossil", "miss")),
        ("SOME_NEW", "new", "SOME_NEW", ("some_new", "peft")),
        ("a <b>\n|", None, "a &lt;b&gt; \\|", ("a--b---", "peft")),
    ],
)
def test_names_of_methods(peft_type: str, variant: str, name: str, tags: tuple[str, ...]) -> None:
    found = method_of(peft_type, variant)
    assert (found.name, found.tags) == (name, tags)
    card = model_card(facts(record={**RECORD, "adapter": {**LORA, "peft_type": peft_type, "variant": variant}}))
    assert metadata(card)["tags"][: len(tags)] == list(tags) and ("@misc{" in card) == (found.paper is not None)


def test_an_adapter_that_cannot_be_read_is_named_by_its_config() -> None:
    card = model_card(facts("adapter", record=None, config={"peft_type": "LORA", "use_dora": True, "r": 8}))
    assert metadata(card)["tags"] == ["dora", "lora", "peft", "fossil-export"] and "vllm" not in card


def test_how_sure_a_converted_lora_is() -> None:
    def part(**details: Any) -> str:
        record = {**(facts("lora").record or {}), "adapter": LORA, "lora": {"rank": 4, **details}}
        return generated(model_card(facts("lora", record=record)))

    near = part(exact=False, relative_error=0.25, relative_error_by_module={"a": 0.25})
    assert "the LoRA nearest to its update" in near and "| Error of the conversion | 0.25 of the update |" in near
    rounded = part(exact=False, relative_error=3e-8)
    assert "nearest" not in rounded and "| Error of the conversion | 3e-08 of the update |" in rounded
    assert "nearest" not in part(exact=True) and "Error of" not in part(exact=True)


def test_vllm_is_named_for_what_it_takes() -> None:
    assert "vllm serve" in model_card(facts("adapter"))
    for setting in ({"alpha_pattern": {"q": 1}}, {"rank_pattern": {"q": 1}}, {"lora_bias": True}, {"use_dora": True}):
        assert "vllm" not in model_card(facts("adapter", config={**CONFIGS["adapter"], **setting}))
    assert "vllm" not in model_card(facts("adapter", config={**CONFIGS["adapter"], "peft_type": "LOHA"}))
    assert "vllm serve" in model_card(facts("lora", config={**CONFIGS["lora"], "rank_pattern": {"q": 1}}))


@pytest.mark.parametrize(
    ("trained_in", "opened"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlamaModel", "AutoModel"),
        (3, "AutoModel"),
    ],
)
@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_without_a_task_type_the_class_tells_what_to_open(kind: str, trained_in: Any, opened: str) -> None:
    mapping = {"base_model_class": trained_in, "parent_library": "transformers"}
    config = {**CONFIGS[kind], "task_type": None, "auto_mapping": mapping}
    card = model_card(facts(kind, config=config, base_card=None))
    assert f"base = {opened}.from_pretrained(" in card


@pytest.mark.parametrize("converted", [True, False])
def test_the_snippet_runs(converted: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    save_tokenizer(base)
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, task_type="CAUSAL_LM", alpha_pattern={"q_proj": 4})
    folder, kind = tmp_path / "adapter", "adapter"
    if converted:
        folder, kind = convert(folder, tmp_path / "lora", to="lora").output, "lora"
    (code,) = snippets(model_card(replace(local(kind), repo_id=str(folder), files=FILES["miss"])))
    code = code.replace('"the base model"', repr(str(base))).replace("max_new_tokens=64", "max_new_tokens=4")
    exec(compile(code, "snippet", "exec"), {})


class TestPush:
    @pytest.fixture
    def lora(self, hosted: LoopbackHub, models: Path, tmp_path: Path) -> Path:
        config = {"target_modules": QV, "rank_pattern": {"v_proj": 4}}
        make_adapter(tmp_path / "mine", models / "base", kind=LoraConfig, **config)
        edit_json(tmp_path / "mine" / "adapter_config.json", base_model_name_or_path="ada/base", task_type="CAUSAL_LM")
        hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
        return tmp_path / "mine"

    def test_the_trained_folder_itself(self, lora: Path, hosted: LoopbackHub, tmp_path: Path) -> None:
        result = push(lora, "ada/new")
        data, text = card_of(hosted, tmp_path)
        assert set(published(hosted)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert {"lora", "peft", "fossil-export"} <= set(data["tags"]) and not {"fossil", "miss"} & set(data["tags"])
        assert "| Variant | lora |\n| Rank | 8 |" in text and "verif" not in text and "fossil](" not in text.lower()
        assert (data["base_model"], data["base_model_relation"], data["license"]) == ("ada/base", "adapter", "mit")
        assert data["library_name"] == "peft" and not any("verif" in line for line in result.warnings)
        assert not push(lora, "ada/new").changed

    def test_what_was_made_of_it(self, lora: Path, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
        push(lora, "ada/mine")
        made = convert("ada/mine", tmp_path / "lora", to="lora").output
        assert verify(made, level="weights").parity
        push(made, "ada/served")
        data, text = card_of(hosted, tmp_path, "ada/served")
        assert {"lora", "peft"} <= set(data["tags"]) and "fossil" not in data["tags"]
        assert "| Verdict | parity |" in text and "[ada/mine](" in text and "vllm serve ada/base" in text
        push(convert("ada/mine", tmp_path / "mine.gguf", to="gguf-lora").output, "ada/gguf")
        data, text = card_of(hosted, tmp_path, "ada/gguf")
        assert {"lora", "gguf"} <= set(data["tags"]) and "fossil" not in data["tags"] and "| Numbers | f32 |" in text
        push(merge("ada/mine", tmp_path / "merged").output, "ada/merged")
        data, text = card_of(hosted, tmp_path, "ada/merged")
        assert "fine-tuned with [LoRA](" in text and "fossil" not in data["tags"]

    def test_is_what_others_are_compared_with(self, lora: Path) -> None:
        with pytest.raises(FossilExportError, match="is the trained adapter itself; merge or convert it"):
            verify(lora)

    def test_of_a_type_that_nobody_here_knows(self, lora: Path) -> None:
        edit_json(lora / "adapter_config.json", peft_type="NOBODYS")
        with pytest.raises(FossilExportError, match="holds a NOBODYS adapter; push it with `hf upload`"):
            push(lora, "ada/new")
