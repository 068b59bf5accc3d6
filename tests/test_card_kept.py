"""A model card that is there already: nothing of the user's is lost, what tools wrote is replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_tools import BASE, QUICK, RECORD, TEMPLATE_FILLER, facts, local, metadata
from conftest import make_adapter, make_base
from huggingface_hub import ModelCard
from hypothesis import assume, given
from hypothesis import strategies as st

from fossil_export import convert
from fossil_export.cards import BEGIN, END, model_card, warnings
from fossil_export.errors import FossilExportError


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
        ("---\n" + "a: [1]\n" * 50_001 + "---\n", 2, "more than 50,000 lines"),
        ("---\na: [" + "1," * 50_001 + "1]\n---\n", 2, "more than 50,000 lines"),
        ("---\nlicense: mit\nsteps: 1" + ":59" * 3000 + "\n---\n", 2, "a number of more than"),
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


def test_metadata_that_stand_for_millions_of_values_are_refused() -> None:
    bomb = "bomb0: &b0 [x]\n" + "".join(f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(FossilExportError, match=r"README\.md: line 2: more than 100,000 values"):
        model_card(facts(), f"---\n{bomb}---\n# Mine\n")


def test_a_record_whose_names_are_none_is_read_over() -> None:
    assert "fossil-export" in model_card(
        facts(record={**RECORD, "adapter": {**RECORD["adapter"], "name": ["q_proj", 3]}})
    )
