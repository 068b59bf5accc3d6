"""`push`, over real HTTP: no path of this machine is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from push_tools import card_of, published

from fossil_export import convert, merge, push, verify
from fossil_export.publishing._paths import Paths, is_path


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


def test_half_a_character_is_published_as_json_writes_it(tmp_path: Path) -> None:
    record = json.dumps({"name": str(tmp_path / "model"), "\ud800": "\ud800"}).encode()
    assert json.loads(Paths([tmp_path], []).published("fossil_export.json", record)) == {
        "name": "model",
        "\ud800": "\ud800",
    }


@pytest.mark.parametrize("name", ["/a\0b", "/\ud800", "/" + "x" * 5000, "x" * 5000])
def test_names_that_no_file_can_have(name: str) -> None:
    assert Paths([], [name]).without({"name": name})["name"] == name.removeprefix("/")
    assert is_path(name) == name.startswith("/")


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
