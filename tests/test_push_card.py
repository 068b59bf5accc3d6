"""`push`, over real HTTP: the model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import edit_json
from loopback import LoopbackHub
from push_tools import WORDS, card_of, graph, made

from fossil_export import FossilExportError, __version__, merge, push, verify


def test_the_oldest_models_are_named_as_today(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """gpt2 is openai-community/gpt2 now, and adapters' configs name it as it was."""
    hosted.renamed = {"ancient": "ada/base"}
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
    folder = made("miss", hosted, models, tmp_path / "miss")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="ancient")
    (folder / "README.md").write_text("---\nbase_model: ancient\n---\n# Mine\n\nWords.\n")
    push(folder, "ada/new")
    data, text = card_of(hosted, tmp_path)
    assert (data["base_model"], data["license"]) == ("ancient", "mit") and "[ada/base]" in text
    edit_json(folder / "adapter_config.json", base_model_name_or_path="unheard-of")
    (folder / "README.md").unlink()
    assert any("the base is not on the Hub" in line for line in push(folder, "ada/other").warnings)


def test_a_lone_file_takes_no_card_that_lies_beside_it(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    artifact = made("gguf-file", hosted, models, tmp_path / "project")
    (tmp_path / "project" / "README.md").write_text("# My secret project\n\nPlans.")
    push(artifact, "ada/new")
    assert "secret" not in card_of(hosted, tmp_path)[1]


def test_a_card_in_the_folder_is_extended(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    text = WORDS.replace("\n", "\r\n")
    (folder / "README.md").write_bytes(text.encode())
    push(folder, "ada/new")
    found = hosted.read("ada/new", "README.md").decode()
    data, _ = card_of(hosted, tmp_path)
    assert data["license"] == "cc0-1.0" and data["base_model"] == "ada/base"
    assert found.count("\n") == found.count("\r\n") and text.partition("# Mascot")[2] in found
    assert not push(folder, "ada/new").changed
    assert (folder / "README.md").read_bytes() == text.encode()


@pytest.mark.parametrize("kind", ["merged", "miss", "lora"])
def test_a_card_edited_on_the_web_is_kept(kind: str, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made(kind, hosted, models, tmp_path / "artifact")
    if kind == "miss":  # PEFT's template is no word of the user's
        shutil.copy(models / "adapter" / "README.md", folder)
    push(folder, "ada/new")
    text = hosted.read("ada/new", "README.md").decode()
    edited = text.replace("tags:", "license: mit\ntags:") + "\nA word of mine.\n"
    hosted.commit("ada/new", {"README.md": edited.replace("## Citation", "## Zitat").encode()})
    result = push(folder, "ada/new")
    assert result.changed and hosted.read("ada/new", "README.md").decode() == edited
    assert not any("license" in line or "gave way" in line for line in result.warnings)
    assert not push(folder, "ada/new").changed


def test_two_cards(hub: LoopbackHub, tmp_path: Path) -> None:
    """The folder's wins where it has text, and the user is told what went; metadata alone does not cost the other's."""
    folder = graph(tmp_path / "artifact")
    push(folder, "ada/new")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    result = push(folder, "ada/new")
    assert card_of(hub, tmp_path)[0]["license"] == "mit" and not any("license" in line for line in result.warnings)
    hub.commit("ada/new", {"README.md": b"---\nlicense: apache-2.0\n---\nFrom the web.\n"})
    result = push(folder, "ada/new")
    assert "From the web." in card_of(hub, tmp_path)[1] and any("was not taken" in line for line in result.warnings)
    (folder / "README.md").write_text("From the folder.\n")
    result = push(folder, "ada/new")
    assert "From the folder." in card_of(hub, tmp_path)[1] and any("gave way" in line for line in result.warnings)
    assert not any("gave way" in line for line in push(folder, "ada/new").warnings)


@pytest.mark.parametrize("card, said", [(b"---\na: [\n---\nx", "README.md: line"), (b"\xff\xfe", "not UTF-8")])
def test_a_card_that_cannot_be_read(card: bytes, said: str, hub: LoopbackHub, tmp_path: Path) -> None:
    """It stops a push before anything is sent, in the folder or on the Hub."""
    folder = graph(tmp_path / "artifact")
    hub.create("ada/new")
    head = hub.commit("ada/new", {"README.md": card})
    for place in ("there", "here"):
        with pytest.raises(FossilExportError, match=said) as raised:
            push(folder, "ada/new")
        assert str(raised.value).startswith("ada/new: ") == (place == "there")
        assert hub.head("ada/new") == head and not any(seen.method == "PUT" for seen in hub.log)
        if place == "there":
            head = hub.commit("ada/new", {}, delete=["README.md"])
            (folder / "README.md").write_bytes(card)


def test_the_card_quotes_verification_and_the_bases_license(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\nlanguage: en\n---\n# Base\n"})
    merged = merge("ada/adapter", tmp_path / "merged").output
    assert any("was not verified" in line for line in push(merged, "ada/new").warnings)
    verify(merged, level="weights")
    result = push(merged, "ada/new")
    data, text = card_of(hosted, tmp_path)
    assert result.warnings == () and (data["license"], data["language"]) == ("mit", "en")
    assert "| Verdict | parity |" in text and "fossil_parity.json" in result.files


@pytest.mark.parametrize("kind", ["miss", "gguf-file", "gguf-folder"])
def test_the_card_of_an_adapter_tells_what_it_is(kind: str, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """PEFT leaves no record, and a GGUF file carries its own. `verify` looks at neither, and nothing is said of it."""
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
    result = push(made(kind, hosted, models, tmp_path / "artifact"), "ada/new")
    data, text = card_of(hosted, tmp_path)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("ada/base", "adapter", "mit")
    assert {"fossil", "miss", "tile"} <= set(data["tags"])
    assert "| Variant | tile |\n| Rank | 8 |\n| Trained parameters | 6,144 |\n" in text
    assert "verif" not in text and not any("verif" in line for line in result.warnings)
    source = f"[ada/adapter]({hosted.endpoint}/ada/adapter/tree/{hosted.head('ada/adapter')})"
    assert (source in text) == (kind != "miss") and "not on the Hub" not in text
    assert ("| Numbers | f32 |" in text) == (kind != "miss") == (f"Made by | fossil-export {__version__}" in text)


def test_another_license_of_the_adapter_is_told(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    hosted.commit("ada/base", {"README.md": b"---\nlicense: mit\n---\n"})
    merged = merge("ada/adapter", tmp_path / "merged").output
    assert not any("the adapter's license" in line for line in push(merged, "ada/new").warnings)
    hosted.commit("ada/adapter", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    edit_json(merged / "fossil_export.json", adapter={"name": "ada/adapter", "revision": hosted.head("ada/adapter")})
    said = "the adapter's license is cc-by-nc-4.0; the card names the base's, mit: see that both are kept"
    assert said in push(merged, "ada/new").warnings
    assert card_of(hosted, tmp_path)[0]["license"] == "mit"


def test_the_card_of_a_base_that_is_here(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(models / "base", tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    merged = merge(models / "adapter", tmp_path / "merged", base=base).output
    assert not any("the adapter's license" in line for line in push(merged, "ada/new").warnings)
    assert card_of(hub, tmp_path)[0]["license"] == "mit" and "base_model" not in card_of(hub, tmp_path)[0]
    (base / "README.md").write_text("---\na: [\n---\n")
    (said, *_) = push(merged, "ada/other").warnings
    assert said.startswith(f"{base}/README.md: its metadata cannot be read (")
    # A README.md that lies about where the base was is of something else.
    shutil.move(base, tmp_path / "elsewhere")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    push(merged, "ada/third")
    assert "license" not in card_of(hub, tmp_path, "ada/third")[0]
