"""`push`, over real HTTP: what of a folder is published, and what stays."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import edit_json
from hub_tools import content
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from progress_tools import steps_of
from push_tools import HIDDEN, WORDS, card_of, graph, litter, made, published

from fossil_export import FossilExportError, Progress, merge, merge_to_hub, push
from fossil_export.artifacts._parts import parts_of
from fossil_export.errors import CheckpointError


@pytest.mark.parametrize("kind", ["merged", "lora", "miss", "gguf-file", "gguf-folder", "onnx"])
def test_what_is_published(kind: str, hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    artifact = made(kind, hosted, models, tmp_path / "artifact")
    parts = {artifact.name: artifact.read_bytes()} if artifact.is_file() else content(artifact)
    own = parts.pop("README.md", None)
    folder = tmp_path / "artifact"
    behind = litter(folder, *(["pytorch_model.bin", "adapter_model.bin"] if kind != "onnx" else []))
    result = push(artifact, "ada/new")
    found = published(hosted)
    text = found.pop("README.md").decode()
    assert found == parts and (own is None or text.encode() != own)
    assert set(result.left_behind) == (behind if artifact.is_dir() else set())
    assert set(result.files) == {*parts, "README.md"} and result.changed and result.removed == ()
    assert hosted.commits("ada/new")[1:] == ["initial commit"] and result.commit == hosted.head("ada/new")
    assert result.url == f"{hosted.endpoint}/ada/new"
    data, _ = card_of(hosted, tmp_path)
    relation = None if kind == "onnx" else "finetune" if kind == "merged" else "adapter"
    assert (data.get("base_model"), data.get("base_model_relation")) == ("ada/base" if relation else None, relation)
    assert data.get("library_name") == {"merged": "transformers", "lora": "peft", "miss": "peft"}.get(kind)
    assert "fossil-export" in data["tags"] and text.count("fossil-export: begin") == 1

    again = push(artifact, "ada/new")
    assert (again.changed, again.commit) == (False, result.commit)
    assert len(hosted.commits("ada/new")) == 2


def test_code_of_the_models_own_goes_along(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "base", tmp_path / "model"))
    (folder / "my_llama.py").write_text("from .helper import x\n")
    (folder / "helper.py").write_text("x = 1\n")
    assert not {"my_llama.py", "helper.py"} & set(push(folder, "ada/plain").files)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "my_llama.MyLlama"})
    assert {"my_llama.py", "helper.py"} <= set(push(folder, "ada/new").files)


def test_pictures_and_chat_templates_go_along(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    shown = {"docs/loss curve.png", "a b.svg", "logo.png", "more.md", "additional_chat_templates/rag.jinja"}
    behind = litter(folder, *shown, "hidden.png") - shown
    links = '<img src="./logo.png">\n[a](<a b.svg> "A") [more]\n\n[more]: more.md#part\n[w](optimizer.pt) ![](.env)\n'
    (folder / "README.md").write_text(WORDS + links)
    result = push(folder, "ada/new")
    assert shown < set(result.files) and set(result.left_behind) == behind
    assert not {".env", "optimizer.pt"} & set(hub.files("ada/new"))
    assert "base-of-it" in result.files


def test_uploads_in_parts_and_odd_names(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model fetched from the Hub, which lies there as links, with files of names that addresses cannot hold."""
    odd = "sub folder/ä #1?.txt"
    hosted.commit("ada/base", {odd: b"odd", "README.md": b"# Base\nWords.\n"})
    hosted.multipart_above = hosted.part_size = 30_000
    monkeypatch.setattr(sys.modules["fossil_export.publishing._push"], "LARGE", 50_000)  # such a file by itself
    folder = merge("ada/adapter", tmp_path / "merged").output
    told: list[Progress] = []
    push(folder, "ada/new", progress=told.append)
    weights = sorted((path for path in folder.glob("*.safetensors")), key=lambda path: -path.stat().st_size)
    large = [f"uploading {path.name}" for path in weights if path.stat().st_size >= 50_000]
    assert steps_of(told) == ["looking at the files", "opening ada/new", *large, "committing"] and large
    assert hosted.read("ada/new", odd) == b"odd" and content(folder).items() < published(hosted).items()
    assert sum("complete_multipart" in seen.path for seen in hosted.log) == 3
    fetched = Path(snapshot_download("ada/new"))
    push(fetched, "ada/copy")
    assert published(hosted, "ada/copy").keys() == published(hosted).keys()
    hosted.reset_log()
    merge_to_hub("ada/adapter", "ada/streamed", cache_dir=tmp_path / "cache")
    assert published(hosted, "ada/streamed").keys() == published(hosted).keys()


def test_gguf_files_without_their_reader(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made("gguf-file", hosted, models, tmp_path / "artifact")
    monkeypatch.setitem(sys.modules, "gguf", None)
    (said,) = [line for line in push(file, "ada/new").warnings if "pip install" in line]
    assert said.startswith("the card does not name the base: reading GGUF files needs gguf: ")
    assert hosted.read("ada/new", "adapter.gguf") == file.read_bytes()
    monkeypatch.undo()
    file.write_bytes(b"GGUF, but cut")
    with pytest.raises(CheckpointError, match=r"adapter\.gguf: is no GGUF file that can be read"):
        parts_of(file)


def test_only_templates_come_with_the_templates(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "base", tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool.jinja", "tokens.json"):
        (folder / "additional_chat_templates" / name).write_text("{}")
    files = push(folder, "ada/new").files
    assert [name for name in files if "/" in name] == ["additional_chat_templates/tool.jinja"]


def test_hidden_files_are_never_parts(tmp_path: Path) -> None:
    """Not even those that the record or the card names."""

    @given(st.lists(st.sampled_from(sorted(HIDDEN | {"config.json", "sub/.x/config.json", ".gguf"})), unique=True))
    @settings(max_examples=30, deadline=None)
    def check(names: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name in ["model.onnx", *names]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        (folder / "fossil_export.json").write_text(json.dumps({"companions": names}))
        (folder / "README.md").write_text("".join(f"![]({name})" for name in names))
        parts = parts_of(folder)
        assert not any(part.startswith(".") for name in (*parts.names, *parts.left_behind) for part in name.split("/"))

    folder = tmp_path / "artifact"
    check()


def test_what_is_no_artifact(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folders = {
        "empty": ({}, "holds no model; name the folder that"),
        "notes": ({"notes.txt": ""}, r"holds no model, adapter, GGUF file or ONNX graph \(only notes.txt\)"),
        "config": ({"adapter_config.json": '{"peft_type": "LORA"}'}, "but no adapter_model.safetensors"),
        "ia3": ({"adapter_config.json": '{"peft_type": ["IA3"]}', "adapter_model.bin": ""}, "hf upload"),
        "broken": ({"adapter_config.json": "{", "adapter_model.bin": ""}, "not valid JSON"),
        "sharded": ({"a.safetensors": "", "b.safetensors": ""}, "no index"),
        "pickled": ({"pytorch_model.bin": ""}, "holds no model"),
        "record": ({"model.onnx": "", "fossil_export.json": "[]"}, "not a JSON object"),
    }
    for name, (files, said) in folders.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        with pytest.raises(FossilExportError, match=said) as raised:
            push(tmp_path / name, "ada/new")
        assert str(raised.value).count(str(tmp_path / name)) == 1 and "\n" not in str(raised.value)
    for path, said in ((tmp_path / "none", "no such file or folder; name"), (tmp_path / "empty" / "..", "holds no")):
        with pytest.raises(FossilExportError, match=said):
            push(path, "ada/new")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FossilExportError, match="neither a folder nor a GGUF"):
        push(tmp_path / "a.txt", "ada/new")
    assert hub.repos() == [] and hub.log == []
