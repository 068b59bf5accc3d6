"""The model card: its metadata as the Hub reads them, its snippets, and that nothing of the user's is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_adapter, make_base
from huggingface_hub import ModelCard, metadata_load
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fossil_export import convert
from fossil_export.artifacts.kinds import KINDS
from fossil_export.cards import BEGIN, END, Facts, model_card, warnings
from fossil_export.cards.task import pipeline_tag
from fossil_export.errors import FossilExportError

BASE, ADAPTER, LOCAL = "meta-llama/Llama-3.2-1B", "ada/mascot-miss", "/home/ada/models/base"
REVISION, ADAPTER_REVISION = "a" * 40, "b" * 40
RECORD = {
    "tool": {"name": "fossil-export", "version": "0.4.0"},
    "adapter": {"name": ADAPTER, "peft_type": "MISS", "variant": "tile", "rank": 64, "parameters": 9_830_400},
    "base": {"name": BASE, "revision": REVISION},
    "dtype": "auto",
    "config_edits": {},
    "survival": {"survived": 0.9934, "energy": 1.1, "sample_rows_per_tensor": 64},
}
CERTIFICATE = {
    "parity": True,
    "reason": None,
    "adapter": {"name": ADAPTER, "variant": "tile", "rank": 64},
    "base": LOCAL,
    "device": "cpu (x86_64, 2 cores)",
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "weights": {"tensors": 272, "merged": 210, "wrong": 0, "worst_error_in_steps": 0.5, "elements_off": 0},
    "forward": {
        "prompts": 16,
        "truth": "float64",
        "trainer": {"dtype": "bfloat16", "relative_error": 0.0347, "kl": 0.014, "top1": 0.977},
        "artifact": {"relative_error": 0.0289, "kl": 0.0139, "top1": 0.9766},
        "same_continuations": [3, 4],
        "first_module_outside": None,
    },
}
BASE_CARD = {
    "language": ["en", "de"],
    "license": "llama3.2",
    "pipeline_tag": "text-generation",
    "tags": ["facebook", "llama-3"],
    "datasets": ["allenai/c4"],
    "metrics": ["accuracy"],
    "extra_gated_prompt": "Sign here",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FILES: dict[str, tuple[str, ...]] = {
    "merged": ("config.json", "model.safetensors", *TOKENIZER, "chat_template.jinja"),
    "lora": ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER),
    "miss": ("adapter_config.json", "adapter_model.safetensors"),
    "gguf-lora": ("mascot.gguf",),
    "onnx": ("model.onnx", "model.onnx.data", "genai_config.json", "adapter.onnx_adapter", *TOKENIZER),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "merged": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"},
    "lora": {"task_type": "CAUSAL_LM", "r": 64, "peft_type": "LORA", "base_model_name_or_path": BASE},
    "miss": {"task_type": "CAUSAL_LM", "r": 64, "peft_type": "MISS", "base_model_name_or_path": BASE},
}
TEMPLATE_FILLER = "[More Information Needed]"


def facts(kind: str = "merged", **changes: Any) -> Facts:
    details = {
        "lora": {"lora": {"rank": 64, "exact": True}, "survival": {}},
        "onnx": {"mode": "swappable", "precision": "fp32", "runtime": "genai", "graph": "model.onnx", "survival": {}},
    }
    found = Facts(
        repo_id="ada/mascot",
        kind=kind,
        files=FILES[kind],
        record={**RECORD, **details.get(kind, {})},
        certificate=CERTIFICATE,
        config=CONFIGS.get(kind),
        base=BASE,
        base_revision=REVISION,
        adapter=ADAPTER,
        adapter_revision=ADAPTER_REVISION,
        base_card=BASE_CARD,
    )
    return replace(found, **changes)


def local(kind: str = "merged", **changes: Any) -> Facts:
    """Neither base nor adapter is on the Hub."""
    known = facts(kind)
    record = {**(known.record or {}), "base": {"name": LOCAL}, "adapter": {"name": "/home/ada/my-adapter"}}
    config = {**(known.config or {}), "base_model_name_or_path": LOCAL}
    nothing = {"base": None, "base_revision": None, "adapter": None, "adapter_revision": None, "base_card": None}
    return replace(known, **{"record": record, "config": config, **nothing, **changes})


def metadata(card: str) -> dict[str, Any]:
    """As the Hub's own client reads them; ModelCard must agree."""
    found = ModelCard(card).data.to_dict()
    block = re.match(r"---\n(.*?\n)---\n", card.replace("\r\n", "\n"), re.DOTALL)
    assert block is not None and yaml.safe_load(block[1]) == found
    return found


def generated(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END) + len(END)]


def snippets(card: str, language: str = "python") -> list[str]:
    return [found[2] for found in re.finditer(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize(
    ("kind", "relation", "library", "tags"),
    [
        ("merged", "finetune", "transformers", []),
        ("lora", "adapter", "peft", ["lora"]),
        ("miss", "adapter", "peft", []),
        ("gguf-lora", "adapter", None, ["lora", "gguf"]),
        ("onnx", "finetune", None, ["onnx", "onnxruntime-genai"]),
    ],
)
def test_metadata_of_every_kind(kind: str, relation: str, library: str | None, tags: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(facts(kind)))
    expected = {
        "base_model": BASE,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": "llama3.2",
        "language": ["en", "de"],
        "tags": ["fossil", "miss", "tile", "fossil-export", *tags],
    }
    assert metadata_load(tmp_path / "README.md") == {key: value for key, value in expected.items() if value}
    metadata((tmp_path / "README.md").read_text())


def test_int4_is_quantized_and_bone_is_named() -> None:
    record = {**(facts("onnx").record or {}), "precision": "int4"}
    assert metadata(model_card(facts("onnx", record=record)))["base_model_relation"] == "quantized"
    bone = {**RECORD, "adapter": {"peft_type": "BONE", "variant": "bat", "rank": 8}}
    assert metadata(model_card(facts(record=bone)))["tags"] == ["fossil", "miss", "bone", "bat", "fossil-export"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_is_published(kind: str) -> None:
    certificate = {**CERTIFICATE, "parity": False, "reason": f"{LOCAL}/model.safetensors: lm_head.weight differs"}
    card = model_card(local(kind, certificate=certificate))
    assert "/home" not in card
    assert {"base_model", "base_model_relation", "license", "language"}.isdisjoint(metadata(card))
    assert "not on the Hub" in card
    assert "model.safetensors: lm\\_head.weight" in card or "model.safetensors: lm_head.weight" in card


def test_a_path_given_as_base_is_no_base() -> None:
    assert LOCAL not in model_card(facts(base=LOCAL))
    assert "base_model" not in metadata(model_card(facts(base=LOCAL)))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("LICENSE", f"https://huggingface.co/{BASE}/blob/main/LICENSE"),
        ("./docs/MY LICENSE", f"https://huggingface.co/{BASE}/blob/main/docs/MY%20LICENSE"),
        ("https://example.org/license", "https://example.org/license"),
    ],
)
def test_license_of_the_base(link: str, expected: str) -> None:
    given = {"license": "other", "license_name": "it's: mine", "license_link": link, "language": False}
    found = metadata(model_card(facts(base_card=given)))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "it's: mine", expected)
    assert found["language"] == "no"
    own = metadata(model_card(facts(base_card=given), "---\nlicense: mit\n---\n# Mine\n"))
    assert own["license"] == "mit" and "license_link" not in own


CAUSAL, SEQUENCE = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["LlamaForSequenceClassification"]}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}


@pytest.mark.parametrize(
    ("kind", "config", "base", "expected"),
    [
        ("merged", CAUSAL, None, "text-generation"),
        ("merged", {"architectures": ["GPT2LMHeadModel"]}, None, "text-generation"),
        ("merged", SEQUENCE, "text-generation", "text-classification"),
        ("merged", {"architectures": ["BertForTokenClassification"]}, "fill-mask", "token-classification"),
        ("merged", {"architectures": ["BertForQuestionAnswering"]}, "fill-mask", "question-answering"),
        ("merged", SEQUENCE, "text-ranking", "text-ranking"),
        ("merged", CAUSAL, "image-text-to-text", "image-text-to-text"),
        ("merged", CAUSAL, "feature-extraction", "feature-extraction"),
        ("merged", LLAVA, None, "image-text-to-text"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, None, "text-generation"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, "translation", "translation"),
        ("merged", {"architectures": ["T5ForConditionalGeneration"]}, "text2text-generation", "text-generation"),
        ("merged", {"architectures": ["WhisperForConditionalGeneration"], "num_mel_bins": 80}, None, None),
        ("merged", {"architectures": ["BertModel"]}, "sentence-similarity", "sentence-similarity"),
        ("merged", {"architectures": ["BertModel"]}, None, None),
        ("merged", None, None, None),
        ("lora", {"task_type": "SEQ_CLS"}, "text-generation", "text-classification"),
        ("miss", {"task_type": "TOKEN_CLS"}, "fill-mask", "token-classification"),
        ("miss", {"task_type": "SEQ_2_SEQ_LM"}, None, "text-generation"),
        ("miss", {"task_type": None}, "text-generation", "text-generation"),
        ("gguf-lora", None, None, "text-generation"),
    ],
)
def test_pipeline_tag(kind: str, config: dict[str, Any] | None, base: str | None, expected: str | None) -> None:
    card = {"pipeline_tag": base} if base else None
    assert pipeline_tag(facts(kind, config=config, base_card=card)) == expected


def test_task_of_an_onnx_classifier_comes_from_its_record() -> None:
    record = {"mode": "merged", "graph": "model.onnx", "config_edits": SEQUENCE}
    found = facts("onnx", record=record, files=("model.onnx", *TOKENIZER))
    assert metadata(model_card(found))["pipeline_tag"] == "text-classification"


def test_certificate_is_quoted() -> None:
    part = generated(model_card(facts()))
    for line in (
        "| Verdict | parity |",
        "| Weights | 272 tensors, 210 merged, 0 wrong |",
        "| Worst error | 0.5000 steps of the dtype (0.5 is exact rounding) |",
        "| Trainer | 3.47e-02 from the truth, KL 1.4e-02, top-1 97.7% (bfloat16) |",
        "| This model | 2.89e-02 from the truth, KL 1.4e-02, top-1 97.7% |",
        "| Same continuations | 3 of 4 (16 prompts, truth in float64) |",
        "| Device | cpu (x86_64, 2 cores) |",
        "| Versions | torch 2.13.0, transformers 5.23.0, peft 0.21.2 |",
        "| Trained parameters | 9,830,400 |",
        "| Dtype | bfloat16 |",
    ):
        assert line in part.splitlines()
    assert "99.3% of the trained update" in part and "little" not in part
    assert f"[{BASE}](https://huggingface.co/{BASE}/tree/{REVISION})" in part
    assert f"[{ADAPTER}](https://huggingface.co/{ADAPTER}/tree/{ADAPTER_REVISION})" in part
    assert "2409.15371" in part


@pytest.mark.parametrize("certificate", [None, {}, {"parity": "yes"}])
def test_unverified_and_broken_certificates(certificate: dict[str, Any] | None) -> None:
    assert "It was not verified" in model_card(facts(certificate=certificate))
    assert any("fossil-export verify" in line for line in warnings(facts(certificate=certificate)))


def test_figures_that_are_missing() -> None:
    broken = {
        "parity": False,
        "reason": "a | b",
        "weights": {"worst_error_in_steps": None},
        "forward": {"trainer": {"kl": None}, "first_module_outside": "model.layers.3"},
    }
    part = generated(model_card(facts(certificate=broken)))
    assert "| Verdict | **no parity**: a \\| b |" in part
    assert "| Leaves the band at | model.layers.3 |" in part


def test_warnings() -> None:
    assert warnings(facts()) == []
    low = {**RECORD, "survival": {"survived": 0.42}}
    assert "That is little" in model_card(facts(record=low))
    assert any("42.0%" in line for line in warnings(facts(record=low)))
    wrong = {**CERTIFICATE, "parity": False, "reason": "lm_head.weight differs"}
    assert any("lm_head.weight differs" in line for line in warnings(facts(certificate=wrong)))
    found = warnings(local())
    assert any("license" in line for line in found) and any("not on the Hub" in line for line in found)
    assert not any("license" in line for line in warnings(local(), "---\nlicense: mit\n---\n"))
    assert any("README.md's is kept" in line for line in warnings(facts(), "---\nbase_model: other/model\n---\n"))
    assert any("2 places" in line for line in warnings(facts(), f"# Me\n{TEMPLATE_FILLER}\n{TEMPLATE_FILLER}\n"))
    assert any(repr(LOCAL) in line for line in warnings(local(), f"# Me\n\nTrained on {LOCAL}.\n"))
    assert all("\n" not in line for line in found)


# What the user wrote


def test_user_keys_win_and_tags_are_joined() -> None:
    existing = (
        "---\n# mine\nlanguage: no  # Norwegian\ntags:\n- zebra\n- fossil\n# about the licence\nlicense: mit\n"
        "base_model: ada/her-base\npipeline_tag: summarization\nlibrary_name:\n---\n# Mine\n"
    )
    card = model_card(facts(), existing)
    assert card.startswith(
        "---\n# mine\nlanguage: no  # Norwegian\ntags:\n- zebra\n- fossil\n- miss\n- tile\n- fossil-export\n"
        "# about the licence\nlicense: mit\nbase_model: ada/her-base\npipeline_tag: summarization\n"
        "library_name: transformers\nbase_model_relation: finetune\n---\n# Mine\n\n"
    )


def test_what_was_written_here_gives_way_to_the_next_model() -> None:
    """Metadata that an earlier card was given are no words of the user's, unless they were changed since."""
    mine = "---\ntags:\n- zebra\n# mine\npipeline_tag: summarization\n---\n# Mine\n"
    first = model_card(facts(), mine)
    assert metadata(first)["license"] == "llama3.2" and metadata(first)["tags"][:3] == ["zebra", "fossil", "miss"]
    edited = first.replace("language:\n- en\n- de\n", "language: fr\n")
    assert edited != first
    record = {**RECORD, "adapter": {**RECORD["adapter"], "variant": "bat"}}
    other = facts(base="ada/other", record=record, base_card={"language": "en"})
    assert not any("README.md names" in line for line in warnings(other, edited))
    assert any("license is not known" in line for line in warnings(other, edited))
    second = model_card(other, edited)
    found = metadata(second)
    assert found["base_model"] == "ada/other" and "license" not in found and found["language"] == "fr"
    assert found["tags"] == ["zebra", "fossil", "miss", "bat", "fossil-export"]
    assert found["pipeline_tag"] == "summarization" and "# mine\n" in second
    assert model_card(other, second) == second
    assert metadata(model_card(facts(), model_card(other, model_card(facts())))) == metadata(model_card(facts()))


@pytest.mark.parametrize("note", ["{", "[1]", '"x"', "[" * 100_000])
def test_a_damaged_note_is_none(note: str) -> None:
    existing = f"---\nlicense: mit\n---\n# Mine\n\n{BEGIN}\nold\n<!-- fossil-export wrote: {note} -->\n{END}\n"
    assert metadata(model_card(facts(), existing))["license"] == "mit"


@pytest.mark.parametrize(
    "existing",
    [
        "# Mine\n\ntext",
        "text\r\nwith CRLF\r\n",
        "---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
        "---\nlicense: mit\n---\n",
        "---\nlicense: mit\n---",
        "---\n---\n# Mine\n",
        "---\n\n---\n# Mine\n",
        "---\n# only a comment\n---\n# Mine\n",
        "---\n{}\n---\n# Mine\n",
        "---\n{license: mit, tags: [a]}\n---\n# Mine\n",
        "---\n  license: mit\n  tags: [a]\n---\n# Mine\n",
        "---\ntags: &t [a]\nother: *t\n---\n# Mine\n",
        "---\ntags: one\nwidget:\n- text: x\n---\n# Mine\n",
        "---\ndescription: |\n  long\n\n  text\n---\n# Mine\n",
        "\ufeff---\nlicense: mit\n---\n# Mine\n",
        "\n\n---\nlicense: mit\n---\n# Mine\n",
        f"# Mine\n\n{BEGIN}\nold\n{END}\n\nmore\n",
        "",
        "\n\n",
    ],
)
def test_kinds_of_existing_cards(existing: str) -> None:
    card = model_card(facts(), existing)
    found = metadata(card)
    given = existing.removeprefix("\ufeff").strip().replace("\r\n", "\n")
    if given.startswith("---"):
        user = yaml.safe_load(given.split("---")[1]) or {}
        assert {key: value for key, value in user.items() if key != "tags"}.items() <= found.items()
        given = given.split("---", 2)[2].strip()
    before, _, after = given.replace("old\n", "").partition(f"{BEGIN}\n{END}")
    body = ModelCard(card).text.replace("\r\n", "\n")
    assert body.strip().startswith(before.strip()) and body.endswith(after + "\n" * ("more" in after or after == ""))
    assert body.count(BEGIN) == body.count(END) == 1 and "old" not in body
    assert ("# mascot" in body) == (not given)
    if "\r\n" in existing:
        assert "\n" not in card.replace("\r\n", "")
    assert model_card(facts(), card) == card


@pytest.mark.parametrize(
    ("existing", "line", "what"),
    [
        ("---\nlicense: mit\ntags: [a\n---\n# Mine\n", 3, "expected"),
        ("---\nlicense: a: b\n---\n", 2, "mapping values"),
        ("\n---\r\nlicense: mit\r\n\tx: 1\r\n---\r\n", 4, ""),
        ("---\n- a\n- b\n---\n", 2, "list"),
        ("---\nlicense: \x07\n---\n", 2, "not allowed"),
        ("---\ndate: 2024-99-99\n---\n", 2, "month"),
        ("---\nlicense: mit\n# Mine\n", 1, "not closed"),
        (f"---\na: b\n---\n# Mine\n{BEGIN}\ntext\n", 5, "once"),
        (f"# Mine\n{END}\n{BEGIN}\n", 2, "once"),
    ],
)
def test_broken_cards(existing: str, line: int, what: str) -> None:
    with pytest.raises(FossilExportError, match=rf"^README\.md: line {line}: .*{what}.*; [^\n]+$"):
        model_card(facts(), existing)


KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.dates() | KEYS | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language", "tags")
BODIES = st.text(max_size=200) | st.lists(
    st.sampled_from(["# Title", "---", "", "text", "```", f"see {BEGIN}", "| a |", "\t", "a: b"]), max_size=8
).map("\n".join)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(
    data=st.dictionaries(KEYS, VALUES, max_size=4),
    tags=st.none() | st.lists(KEYS.filter(lambda tag: not tag.startswith("base_model:")), max_size=3),
    body=BODIES,
    newline=st.sampled_from(["\n", "\r\n"]),
    flow=st.booleans(),
)
def test_nothing_of_the_user_is_lost(
    data: dict[str, Any], tags: list[str] | None, body: str, newline: str, flow: bool
) -> None:
    assume(not set(data) & {*OURS, "license_name", "license_link"} and "" not in data)
    if tags is not None:
        data = {**data, "tags": tags}
    block = yaml.dump(data, allow_unicode=True, sort_keys=False, default_flow_style=flow) if data else ""
    assume(yaml.safe_load(block or "{}") == data)
    body = body.replace("\r", "")
    existing = f"---\n{block}---\n{body}".replace("\n", newline) if data else body.replace("\n", newline)
    assume(data or not body.lstrip().startswith("---"))
    card = model_card(facts(), existing)
    again = model_card(facts(), card)
    assert again == card
    front, text = re.fullmatch(r"---\r?\n(.*?\n)---\r?\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    found = yaml.safe_load(front)
    assert {key: found[key] for key in data if key != "tags"} == {key: data[key] for key in data if key != "tags"}
    assert found["tags"][: len(tags or [])] == (tags or [])
    assert {"fossil", "fossil-export"} <= set(found["tags"]) and found["base_model"] == BASE
    if body.strip():
        kept = body.replace("\n", newline)
        gap = "" if data or kept.startswith(newline) else "\r\n" if "\r\n" in existing else "\n"
        assert text.startswith(gap + kept)


@QUICK
@given(
    name=st.text(min_size=1, max_size=40)
    | st.sampled_from(["a|b", "`x`", "<b>&", "a: 'b'", 'q"x', f"x\n{END}\n", "```\n"])
)
def test_odd_names(name: str) -> None:
    assume(not any("\ud800" <= c <= "\udfff" or c == "\x85" for c in name))  # PyYAML writes \x85 and reads a space
    record = {**RECORD, "adapter": {"name": name, "variant": name, "rank": name}, "mode": name, "precision": name}
    for kind in KINDS:
        files = tuple(f"{name}{ending}" for ending in (".gguf", ".onnx", ".onnx_adapter"))
        found = facts(
            kind,
            repo_id=f"ada/{name}",
            files=(*files, "genai_config.json") if kind == "onnx" else files,
            record={**record, "tool": {"name": name, "version": name}},
            certificate={**CERTIFICATE, "reason": name, "parity": False, "device": name},
            base_card={"license": name, "license_name": name, "license_link": name, "language": name},
            base_revision=name,
            adapter_revision=name,
        )
        card = model_card(found)
        assert metadata(card)["license"] == name
        assert model_card(found, card) == card
        assert card.count(f"\n{END}\n") == 1
        assert "<b>" not in re.sub(r"(?ms)^(`{3,})\w*\n.*?\n\1$", "", generated(card))
        rows = [line for line in generated(card).splitlines() if line.startswith("|")]
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in rows)
        for code in snippets(card):
            compile(code, "snippet", "exec")


def test_the_cells_read_as_the_names() -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    name = r"a|b `c` *d* __e__ <f> [g](h) ~i~ \j &amp; $k$"
    page = markdown.render(model_card(facts(certificate={**CERTIFICATE, "device": name})))
    cell = re.search(r"<td>Device</td>\s*<td>(.*?)</td>", page)
    assert cell is not None
    assert cell[1] == name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# The cards that tools write


def peft_card(folder: Path, base: Path) -> str:
    make_adapter(folder, base)
    with (folder / "README.md").open(newline="") as file:
        return file.read()


def test_pefts_template(tmp_path: Path) -> None:
    existing = peft_card(tmp_path / "adapter", make_base(tmp_path / "base"))
    assert TEMPLATE_FILLER in existing and str(tmp_path) in existing
    own = {"base_model_name_or_path": str(tmp_path / "base"), "task_type": "CAUSAL_LM"}
    for found in (facts("miss"), local("miss", config=own)):
        card = model_card(found, existing)
        assert TEMPLATE_FILLER not in card and str(tmp_path) not in card and "PEFT 0" not in card
        assert "# mascot" in card
        data = metadata(card)
        assert data.get("base_model") == found.base
        assert data["library_name"] == "peft" and data["tags"][0] == "transformers"
        assert not any(tag.startswith("base_model:") for tag in data["tags"])
        assert any("not the base's name" in line for line in warnings(found, existing))
    touched = existing.replace(f"- **Developed by:** {TEMPLATE_FILLER}", "- **Developed by:** Ada")
    assert "- **Developed by:** Ada" in model_card(facts("miss"), touched)
    assert "<!-- mine -->" in model_card(facts("miss"), f"{existing}\n<!-- mine -->\n")


def test_template_of_huggingface_hub_in_another_wording() -> None:
    text = ModelCard.from_template(ModelCard("").data, model_id="my model").text
    assert TEMPLATE_FILLER in text
    text = text.replace("Dataset Card", "Data Card").replace("\n", "\r\n")
    assert TEMPLATE_FILLER not in model_card(
        facts(), f"---\r\nlicense: mit\r\n---\r\n{text}\r\n### Framework versions\r\n"
    )


def test_the_card_of_convert_is_replaced(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    existing = (tmp_path / "lora" / "README.md").read_text()
    record = json.loads((tmp_path / "lora" / "fossil_export.json").read_text())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    card = model_card(local("lora", record=record, config=config), existing)
    assert (
        str(tmp_path) not in card
        and "this-folder" not in card
        and card.count("# LoRA form") == 0 < card.count("# mascot\n")
    )
    own = model_card(local("lora"), existing + "\nMy words.\n")
    assert "this-folder" not in own and own.endswith("\nMy words.\n")


# The snippets


def every_snippet() -> list[Facts]:
    tasks = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", None)
    heads = (
        "LlamaForCausalLM",
        "BertForMaskedLM",
        "ViTForImageClassification",
        "BertModel",
        "PegasusForConditionalGeneration",
    )
    found = [facts(kind, config={"task_type": task, "r": 8}) for kind in ("lora", "miss") for task in tasks]
    found += [facts(config={"architectures": [head], "auto_map": {}}) for head in heads]
    found += [
        facts(config=LLAVA),
        facts(files=("model.safetensors",)),
        local(files=("model.safetensors",)),
        local("lora"),
    ]
    found += [facts("onnx", files=("model.onnx", *more)) for more in ((), TOKENIZER, (*TOKENIZER, "a.onnx_adapter"))]
    return [*found, facts("onnx"), facts("onnx", files=(*FILES["onnx"], "chat_template.jinja"))]


@pytest.mark.parametrize("found", every_snippet())
def test_python_compiles(found: Facts) -> None:
    (code,) = snippets(model_card(found))
    compile(code, "snippet", "exec")
    assert len(max(code.splitlines(), key=len)) <= 120


def test_lines_for_servers() -> None:
    (line,) = snippets(model_card(facts("lora", config={**CONFIGS["lora"], "r": 50})), "bash")
    assert line == f"vllm serve {BASE} --enable-lora --max-lora-rank 64 --lora-modules mascot=ada/mascot"
    for none in ({"r": 1000}, {"modules_to_save": ["lm_head"]}, {"task_type": "SEQ_CLS"}):
        assert "vllm" not in model_card(facts("lora", config={**CONFIGS["lora"], **none}))
    assert "vllm serve" not in model_card(facts("miss"))
    card = model_card(facts("gguf-lora", files=("my mascot.gguf",)))
    assert "hf download ada/mascot 'my mascot.gguf' --local-dir .\n" in card
    assert "llama-server --model base.gguf --lora 'my mascot.gguf'\n" in card
    assert "FROM ./base.gguf\nADAPTER ./my mascot.gguf\n" in card
    assert 'set_active_adapter(adapters, "mine")' in model_card(facts("onnx"))
    assert "apply_chat_template" in model_card(facts("onnx", files=(*FILES["onnx"], "chat_template.jinja")))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_tokenizer(folder: Path, chat: bool = False) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "What", "is", "an", "ammonite", "?"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def published(folder: Path, **changes: Any) -> Facts:
    names = tuple(path.name for path in folder.iterdir())
    return facts(repo_id=str(folder), files=names, config=AutoConfig.from_pretrained(folder).to_dict(), **changes)


@pytest.mark.parametrize("chat", [True, False])
def test_the_merged_snippet_runs(tmp_path: Path, chat: bool) -> None:
    folder = make_base(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    save_tokenizer(folder, chat)
    assert (folder / "chat_template.jinja").is_file() == chat
    (code,) = snippets(model_card(published(folder)))
    assert run(code).strip()


def test_the_other_merged_snippets_run(tmp_path: Path) -> None:
    """In this process: each needs a model of a few thousand numbers."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    t5 = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1)
    made = [
        BertForSequenceClassification(BertConfig(**sizes)),
        BertForTokenClassification(BertConfig(**sizes)),
        T5ForConditionalGeneration(t5),
    ]
    for number, model in enumerate(made):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        (code,) = snippets(model_card(published(folder)))
        exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=4"), "snippet", "exec"), {})


def test_the_peft_snippet_runs(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    save_tokenizer(base)
    make_adapter(tmp_path / "adapter", base, task_type="CAUSAL_LM")
    (code,) = snippets(model_card(replace(local("miss"), repo_id=str(tmp_path / "adapter"))))
    exec(compile(code.replace('"the base model"', repr(str(base))), "snippet", "exec"), {})
