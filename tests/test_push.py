"""`push`, over real HTTP: what of a folder is published, what stays, the card, and where it goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import ADA, edit_json
from hub_tools import cli, content
from huggingface_hub import metadata_load, snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, environment
from onnx import TensorProto, helper
from safetensors.torch import load_file

from fossil_export import FossilExportError, __version__, convert, merge, merge_to_hub, push, verify
from fossil_export.artifacts.parts import parts_of
from fossil_export.errors import CheckpointError
from fossil_export.publishing.paths import Paths

JUNK = {
    "training_args.bin", "optimizer.pt", "trainer_state.json", "notes.txt", "wandb/run-1/files/output.log",
    "checkpoint-10/model.safetensors", "runs/events.out.tfevents.1", "rng_state.pth", "predictions.csv",
}  # fmt: skip
HIDDEN = {".env", ".git/config", ".cache/huggingface/token", ".ipynb_checkpoints/a.json"}
WORDS = "---\nlicense: cc0-1.0\n---\n\n# Mascot\n\nTrained with care. ![Loss](docs/loss%20curve.png)\n"


def litter(folder: Path, *names: str) -> set[str]:
    """Put what lies about beside models into a folder; returns the names that can be seen."""
    for name in (*JUNK, *HIDDEN, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"HF_TOKEN=hf_secretsecret " + name.encode())
    return JUNK | set(names)


def published(hub: LoopbackHub, repo: str = "ada/new", revision: str = "main") -> dict[str, bytes]:
    return {name: hub.read(repo, name, revision) for name in hub.files(repo, revision) if name != ".gitattributes"}


def card_of(hub: LoopbackHub, tmp_path: Path, repo: str = "ada/new") -> tuple[dict[str, Any], str]:
    """The metadata as the Hub's client reads it, and the text."""
    path = tmp_path / "published.md"
    path.write_bytes(hub.read(repo, "README.md"))
    return dict(metadata_load(path) or {}), path.read_text()


def graph(folder: Path) -> Path:
    """An ONNX folder whose graph keeps its weights in a file that no pattern knows."""
    folder.mkdir()
    weights = helper.make_tensor("W", TensorProto.FLOAT, [64, 64], bytes(4 * 64 * 64), raw=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    made = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", ends[:1], ends[1:], [weights])
    onnx.save(helper.make_model(made), folder / "model.onnx", save_as_external_data=True, location="base-of-it")
    for name in ("config.json", "genai_config.json", "tokenizer.json", "adapter.onnx_adapter"):
        (folder / name).write_text("{}")
    return folder


def made(kind: str, hub: LoopbackHub, models: Path, folder: Path) -> Path:
    """An artifact of the adapter ada/adapter."""
    if kind == "merged":
        return merge("ada/adapter", folder).output
    if kind == "lora":
        return convert("ada/adapter", folder, to="lora").output
    if kind == "miss":
        ignored = shutil.ignore_patterns("checkpoint-*", "README.md")
        return Path(shutil.copytree(models / "adapter", folder, ignore=ignored))
    if kind == "onnx":
        return graph(folder)
    folder.mkdir()
    file = convert("ada/adapter", folder / "adapter.gguf", to="gguf-lora").output
    return file if kind == "gguf-file" else folder


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
    monkeypatch.setattr(sys.modules["fossil_export.publishing.push"], "LARGE", 50_000)  # such a file by itself
    folder = merge("ada/adapter", tmp_path / "merged").output
    steps: list[str] = []
    push(folder, "ada/new", progress=steps.append)
    weights = sorted((path for path in folder.glob("*.safetensors")), key=lambda path: -path.stat().st_size)
    large = [f"uploading {path.name}" for path in weights if path.stat().st_size >= 50_000]
    assert steps == ["opening ada/new", *large, "committing"] and large
    assert hosted.read("ada/new", odd) == b"odd" and content(folder).items() < published(hosted).items()
    assert sum("complete_multipart" in seen.path for seen in hosted.log) == 3
    fetched = Path(snapshot_download("ada/new"))
    push(fetched, "ada/copy")
    assert published(hosted, "ada/copy").keys() == published(hosted).keys()
    hosted.reset_log()
    merge_to_hub("ada/adapter", "ada/streamed", cache_dir=tmp_path / "cache")
    assert published(hosted, "ada/streamed").keys() == published(hosted).keys()


def test_a_lone_file_takes_no_card_that_lies_beside_it(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    artifact = made("gguf-file", hosted, models, tmp_path / "project")
    (tmp_path / "project" / "README.md").write_text("# My secret project\n\nPlans.")
    push(artifact, "ada/new")
    assert "secret" not in card_of(hosted, tmp_path)[1]


# The card


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
    source = f"[ada/adapter](https://huggingface.co/ada/adapter/tree/{hosted.head('ada/adapter')})"
    assert (source in text) == (kind != "miss") and "not on the Hub" not in text
    assert ("| Numbers | f32 |" in text) == (kind != "miss") == (f"Made by | fossil-export {__version__}" in text)


def test_gguf_files_without_their_reader(
    hosted: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made("gguf-file", hosted, models, tmp_path / "artifact")
    monkeypatch.setitem(sys.modules, "gguf", None)
    (said,) = [line for line in push(file, "ada/new").warnings if "pip install" in line]
    assert said.startswith("the card does not name the base: reading GGUF files needs gguf: pip install")
    assert hosted.read("ada/new", "adapter.gguf") == file.read_bytes()
    monkeypatch.undo()
    file.write_bytes(b"GGUF, but cut")
    with pytest.raises(CheckpointError, match=r"adapter\.gguf: is no GGUF file that can be read"):
        parts_of(file)


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


# What of this machine stays here


def test_no_path_of_this_machine_is_published(
    hub: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "ada's secret lab"
    base = Path(shutil.copytree(models / "base", secret / "base"))
    edit_json(base / "config.json", _name_or_path=str(secret / "older base"))
    template, file = "{{ '/home/x/y' }}", f"{secret}/tokenizer.json"
    edit_json(base / "tokenizer_config.json", chat_template=template, tokenizer_file=file)
    adapter = Path(shutil.copytree(models / "adapter", secret / "adapter", ignore=shutil.ignore_patterns("check*")))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    (adapter / "README.md").write_text(f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\n")
    merged = merge(adapter, secret / "merged").output
    verify(merged, level="weights")
    edit_json(merged / "fossil_parity.json", parity=False, reason=f"{secret}/merged/model.safetensors: differs")
    lora = convert(adapter, secret / "lora", to="lora").output
    gguf = convert(adapter, secret / "adapter.gguf", to="gguf-lora").output
    monkeypatch.chdir(secret)
    merge("adapter", "relative", base="../ada's secret lab/base")
    for number, folder in enumerate([merged, lora, adapter, Path("relative"), gguf]):
        result = push(folder, f"ada/new-{number}")
        found = published(hub, f"ada/new-{number}")
        for name, data in found.items():
            assert not any(word in data for word in (b"secret lab", b"/tmp/", str(tmp_path).encode())), name
        config = json.loads(found.get("adapter_config.json", b"{}"))
        assert config.get("base_model_name_or_path") is None
        assert any("names the base by a path" in line for line in result.warnings) == bool(config)
        assert "base_model" not in card_of(hub, tmp_path, f"ada/new-{number}")[0]
        if "fossil_export.json" in found:
            record = json.loads(found["fossil_export.json"])
            assert (record["base"]["name"], record["adapter"]["name"]) == ("base", "adapter")
        if "config.json" in found:
            assert json.loads(found["config.json"])["_name_or_path"] == "older base"
            assert json.loads(found["tokenizer_config.json"]) == {
                "chat_template": "{{ '/home/x/y' }}",
                "tokenizer_file": "tokenizer.json",
            }
        assert folder.exists() and not push(folder, f"ada/new-{number}").changed


@given(st.lists(st.text("ab.-_ ", min_size=1, max_size=6), min_size=1, max_size=4), st.text("xy:;,( )'/", max_size=8))
@settings(max_examples=60, deadline=None)
def test_paths_are_found_in_any_text(parts: list[str], around: str) -> None:
    home = Path("/home/someone")
    path = "/".join([str(home), *(part.strip() or "a" for part in parts)])
    paths = Paths([home], [])
    record = {"a": [{"b": path}], "reason": f"{around} {home}/base/x: {around}", "c": f"see {home}/base: {around}"}
    cleaned = json.dumps(paths.without(record))
    assert "/home" not in cleaned
    told = {"reason": f"{path.strip()}/x.bin: tensor a/b at 1/2 differs"}
    assert paths.without(told)["reason"].endswith("x.bin: tensor a/b at 1/2 differs")
    plain = {"name": "user/repo", "node": "/model/layers.0/MatMul", "url": "https://a.b/home/someone/x", "n": 1}
    assert paths.without(plain) == plain


def test_paths_of_other_machines_stay_out_of_configs(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """Whoever trained it left them there; what only begins with a slash and is no path is kept."""
    folder = Path(shutil.copytree(models / "base", tmp_path / "model"))
    edit_json(folder / "config.json", _name_or_path="C:\\Users\\ada\\llama", think="/no_think/now")
    edit_json(folder / "tokenizer_config.json", tokenizer_file="/scratch/ada/tokenizer.json", name_or_path="ada/base")
    push(folder, "ada/new")
    config, tokenizer = (json.loads(hub.read("ada/new", name)) for name in ("config.json", "tokenizer_config.json"))
    assert (config["_name_or_path"], config["think"]) == ("llama", "/no_think/now")
    assert (tokenizer["tokenizer_file"], tokenizer["name_or_path"]) == ("tokenizer.json", "ada/base")


def test_only_templates_come_with_the_templates(hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "base", tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool.jinja", "tokens.json"):
        (folder / "additional_chat_templates" / name).write_text("{}")
    files = push(folder, "ada/new").files
    assert [name for name in files if "/" in name] == ["additional_chat_templates/tool.jinja"]


def test_whoever_reads_the_output_may_leave(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """It is published all the same, and nothing is said against a path."""
    folder = made("miss", hosted, models, tmp_path / "miss")
    reads, writes = os.pipe()
    os.close(reads)
    ran = subprocess.run(
        [sys.executable, "-m", "fossil_export", "push", folder, "ada/new", "--json"],
        env=environment(hosted, tmp_path / "home of child", ADA),
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert "error" not in ran.stderr and "adapter_model.safetensors" in hosted.files("ada/new")


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


# Where it goes


def test_private_and_bare_names(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    result = push(folder, "new", private=True)
    assert result.repo_id == "ada/new" and result.url.endswith("/ada/new")
    assert hub.readable("ada", "ada/new").private and "fossil-export: begin" in card_of(hub, tmp_path)[1]
    assert not any("stays public" in line for line in result.warnings)
    hub.create("ada/public")
    for name in ("public", "ada/public"):
        assert sum("stays public" in line for line in push(folder, name, private=True).warnings) == 1
    assert not hub.readable("ada", "ada/public").private


def test_branches_and_pull_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    hub.create("ada/new")
    hub.create("bob/theirs")
    heads = [hub.head("ada/new"), hub.head("bob/theirs")]
    result = push(folder, "ada/new", revision="v1/x", commit_message="Mine")
    assert result.url == f"{hub.endpoint}/ada/new/tree/v1%2Fx" and result.revision == "v1/x"
    assert hub.commits("ada/new", "v1/x") == ["Mine", "initial commit"]
    assert "model.onnx" in hub.files("ada/new", "v1/x") and not push(folder, "ada/new", revision="v1/x").changed

    for number, repo in enumerate(["ada/new", "bob/theirs"]):
        result = push(folder, repo, create_pr=True)
        assert result.pr_url == result.url == f"{hub.endpoint}/{repo}/discussions/1" and result.changed
        assert "model.onnx" in hub.files(repo, "refs/pr/1") and "model.onnx" not in hub.files(repo)
        assert hub.head(repo) == heads[number]
    push(folder, "ada/new", revision="refs/pr/1", commit_message="More")
    (folder / "genai_config.json").write_text('{"more": 1}')
    push(folder, "ada/new", revision="refs/pr/1", commit_message="More")
    assert hub.commits("ada/new", "refs/pr/1")[0] == "More" and hub.head("ada/new") == heads[0]
    with pytest.raises(FossilExportError, match="no such revision"):
        push(folder, "ada/new", revision="none", create_pr=True)
    # A pull request that would change nothing is none.
    result = push(folder, "ada/new", revision="refs/pr/1", create_pr=False)
    assert not result.changed and result.pr_url is None


def test_weights_of_an_earlier_model_go_in_the_same_commit(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    old = ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json"]
    kept = ["training_args.bin", "sub/model.safetensors", "vae.gguf", "notes.txt"]
    hosted.create("ada/new")
    hosted.commit("ada/new", dict.fromkeys([*old, *kept], b"old"))
    result = push(folder, "ada/new")
    assert set(result.removed) == set(old) and not set(old) & set(hosted.files("ada/new"))
    assert set(kept) <= set(hosted.files("ada/new")) and len(hosted.commits("ada/new")) == 3
    (said,) = [line for line in result.warnings if "earlier model" in line]
    assert all(name in said for name in old) and push(folder, "ada/new").removed == ()


def test_adapters_of_an_earlier_push_go_too(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """PEFT takes .safetensors before .bin, and a record is of the files that it came with."""
    push(convert("ada/adapter", tmp_path / "lora", to="lora").output, "ada/new")
    folder = made("miss", hosted, models, tmp_path / "miss")
    state = load_file(folder / "adapter_model.safetensors")
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    result = push(folder, "ada/new")
    assert set(result.removed) == {"adapter_model.safetensors", "fossil_export.json"}
    assert set(published(hosted)) == {"README.md", "adapter_config.json", "adapter_model.bin"}


def test_a_model_does_not_replace_its_base(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    head = hosted.head("ada/base")
    hosted.commit("ada/base", {"a.txt": b"a"}, branch="v2")
    merged = merge("ada/adapter", tmp_path / "merged", base=f"ada/base@{head}").output
    for arguments in (
        ["push", merged, "ada/base"],
        ["push", merged, "ada/base", "--revision", "main"],
        ["merge", "ada/adapter", "--base", f"ada/base@{head}", "--push-to-hub", "ada/base", "--stream"],
        ["merge", "ada/adapter", "--base", "ada/base@v2", "--push-to-hub", "ada/base", "--stream", "--revision", "v2"],
    ):
        told = cli(*arguments, *(["--cache-dir", tmp_path / "cache"] if "--stream" in arguments else []), code=1)
        assert "ada/base: is the base itself, and the next merge would be on top of this one" in told.stderr
    assert hosted.head("ada/base") == head and hosted.commits("ada/base", "v2")[0] == "Change files"
    push(merged, "ada/base", revision="merged")
    push(merged, "ada/base", create_pr=True)
    assert hosted.head("ada/base") == head


def test_models_and_adapters_do_not_meet(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    merged, lora = (made(kind, hosted, models, tmp_path / kind) for kind in ("merged", "lora"))
    push(lora, "ada/lora")
    push(merged, "ada/merged")
    hosted.reset_log()
    for folder, repo, said in ((merged, "ada/lora", "holds an adapter"), (lora, "ada/merged", "holds a whole model")):
        head = hosted.head(repo)
        with pytest.raises(FossilExportError, match=f"{repo}: {said}.*choose another repository"):
            push(folder, repo)
        assert hosted.head(repo) == head
    assert not any(seen.method in ("PUT", "POST") for seen in hosted.log)
    file = made("gguf-file", hosted, models, tmp_path / "gguf")
    assert push(file, "ada/lora").changed


# Refusals


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


@pytest.mark.parametrize("name", ["a/b/c", "~x", "ada/x@main", "", "ada/", "-x", "a--b", "hf://ada/x", "ada/x.git"])
def test_bad_names_are_told_before_anything_happens(name: str, hub: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = graph(tmp_path / "artifact")
    for arguments in (
        ["push", folder, "--", name],
        ["merge", models / "adapter", "--base", models / "base", "-o", tmp_path / "out", f"--push-to-hub={name}"],
        ["merge", models / "adapter", "--base", models / "base", "--stream", "--dry-run", f"--push-to-hub={name}"],
    ):
        line = cli(*arguments, code=1).stderr
        assert line.startswith(f"error: {name}: is no name of a repository") and line.count("\n") == 1
        assert not name or line.count(name) == 1
    assert hub.log == [] and not (tmp_path / "out").exists()


# The command


def test_the_command(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    litter(folder)
    done = cli("push", folder, "ada/new", "--private", "--revision", "v1", "--commit-message", "Mine", "--json")
    found = json.loads(done.stdout)
    assert found["revision"] == "v1" and found["commit"] == hosted.head("ada/new", "v1")
    assert hosted.readable("ada", "ada/new").private and hosted.commits("ada/new", "v1")[0] == "Mine"
    assert set(found["left_behind"]) == JUNK and found["bytes"] > 200_000
    table = cli("push", folder, "ada/new", "--create-pr").stdout
    assert f"{hosted.endpoint}/ada/new/discussions/1" in table and "left behind" in table
    assert "holds just this already" in cli("push", folder, "ada/new", "--revision", "v1").stdout


def test_merge_and_push_in_one_command(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    done = cli("merge", "ada/adapter", "-o", tmp_path / "out", "--push-to-hub", "ada/new", "--json")
    found = json.loads(done.stdout)
    assert found["push"]["commit"] == hosted.head("ada/new") and found["tensors_merged"] == 14
    shown = cli("merge", "ada/adapter", "-o", tmp_path / "out2", "--push-to-hub", "ada/new2").stdout
    assert "update kept" in shown and "published" in shown
    assert content(tmp_path / "out") == {name: data for name, data in published(hosted).items() if name != "README.md"}
    line = cli(
        "merge", "ada/adapter", "-o", tmp_path / "my out", "--push-to-hub", "bob/new", "--private", code=1
    ).stderr.strip()
    command = f"`fossil-export push '{tmp_path}/my out' bob/new --private`"
    assert "\n" not in line and "may not do that" in line and line.endswith(f"go on with {command})")
    assert (tmp_path / "my out" / "config.json").is_file()


def test_a_process_of_its_own(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("lora", hosted, models, tmp_path / "artifact")
    command = [sys.executable, "-m", "fossil_export", "push", str(folder), "ada/new", "--json"]
    for token, code in ((ADA, 0), (None, 1), ("hf_wrongwrong", 1)):
        home = tmp_path / f"home-{token}"
        done = subprocess.run(command, env=environment(hosted, home, token), capture_output=True, text=True)
        assert done.returncode == code and "hf_" not in done.stdout + done.stderr
        if code:
            assert done.stdout == "" and done.stderr.startswith("error: ada/new: ") and "hf auth login" in done.stderr
            assert done.stderr.count("\n") == 1
        else:
            assert json.loads(done.stdout)["changed"]
            assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert len(hosted.commits("ada/new")) == 2


def test_without_the_network(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FossilExportError, match="HF_HUB_OFFLINE is set; unset it to publish"):
        push(graph(tmp_path / "artifact"), "ada/new")
