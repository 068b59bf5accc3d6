"""`merge --stream`: what it publishes is what a merge and a push publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stream_tools
import torch
from conftest import QV, make_adapter
from hub_tools import cli
from huggingface_hub import snapshot_download
from loopback import Fault, LoopbackHub
from stream_tools import CASES, asked, card, published
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, merge, merge_to_hub, push

scene = stream_tools.scene


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_merge_and_push(name: str, scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    options = dict(CASES[name])
    ways, local = options.pop("ways"), "/" not in options["base"]
    options["adapter"] = bases / options["adapter"]
    options["base"] = bases / options["base"] if local else options["base"]
    result = merge_to_hub(**options, repo_id="ada/streamed", cache_dir=tmp_path / "cache")
    stream = result.plan
    repo = str(options["base"]).removeprefix("hf://").removesuffix("/model.safetensors").partition("/sub/")[0]
    if not local:
        touched = {source.rpartition("/")[2] for move in stream.moves for source in move.sources}
        assert {found.rpartition("/")[2] for found in asked(scene, repo)} == touched
        assert stream.fetched == sum(move.fetch for move in stream.moves)
    small = sum(size for size, _ in published(scene, "ada/streamed").values() if size < 10_000) + 10_000
    down, up = scene.moved()
    assert down < stream.fetched + 2 * small + 65_536 * len(stream.merge.base.files)  # headers, in ranges
    assert up < stream.nbytes("send", "change", "write") + 4 * small

    assert {move.way for move in stream.moves} == ways
    assert result.copied == tuple(move.file.name for move in stream.moves if move.way == "copy")
    assert scene.commits("ada/streamed")[1:] == ["initial commit"]
    adapter, base = options.pop("adapter"), options.pop("base")
    push(merge(adapter, tmp_path / "merged", base=base, **options).output, "ada/pushed")
    assert published(scene, "ada/streamed") == published(scene, "ada/pushed")
    assert card(scene, "ada/streamed") == card(scene, "ada/pushed")
    assert ("license: mit" in card(scene, "ada/streamed")) == (name != "subfolder")  # the card is the repository's
    assert not list((tmp_path / "cache").rglob("*.*")) and str(tmp_path) not in card(scene, "ada/streamed")
    for path, (size, _) in published(scene, "ada/streamed").items():
        assert size > 10_000 or str(tmp_path).encode() not in scene.read("ada/streamed", path)
    assert "README.md" in result.push.left_behind and set(result.push.files) == {
        *published(scene, "ada/streamed"),
        "README.md",
    }
    if name == "qv":
        again = merge_to_hub(adapter, "ada/streamed", base=base, cache_dir=tmp_path / "cache")
        assert not again.push.changed and len(scene.commits("ada/streamed")) == 2


def test_a_large_tokenizer_is_copied_too(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """Unless the adapter brings its own."""
    large = b'{"long": "%s"}' % (b"x" * 11_000_000)
    scene.commit("ada/many", {"tokenizer.json": large})
    scene.reset_log()
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert "tokenizer.json" in result.copied and scene.read("ada/new", "tokenizer.json") == large
    assert sum(scene.moved()) < 2 * result.plan.fetched + 110_000
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    assert published(scene, "ada/new") == published(scene, "ada/pushed")
    result = merge_to_hub(bases / "saved", "ada/other", base="ada/many", cache_dir=tmp_path / "cache")
    assert "tokenizer.json" not in result.copied and scene.read("ada/other", "tokenizer.json") == b'{"version": "mine"}'


@pytest.mark.parametrize("large", [(), (".safetensors", ".json", ".md", ".jinja")], ids=["nothing", "everything"])
def test_whatever_the_hub_keeps_outside_of_git(
    large: tuple[str, ...], hub: LoopbackHub, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in large).encode()
    monkeypatch.setattr("loopback.repos.GITATTRIBUTES", attributes)
    monkeypatch.setattr("loopback.attributes.SAMPLE", 0)  # or weights would be large for their zeros
    hub.add_folder("ada/many", bases / "many")
    result = merge_to_hub(bases / "qv", "ada/streamed", base="ada/many", cache_dir=tmp_path / "cache", hash=True)
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many", hash=True).output, "ada/pushed")
    assert published(hub, "ada/streamed") == published(hub, "ada/pushed")
    assert card(hub, "ada/streamed") == card(hub, "ada/pushed")
    assert ("config.json" in result.copied) == (".json" in large)
    assert not merge_to_hub(
        bases / "qv", "ada/streamed", base="ada/many", cache_dir=tmp_path / "cache", hash=True
    ).push.changed


def test_the_model_that_was_trained(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    tokens = torch.arange(20)[None]
    trained = make_adapter(tmp_path / "adapter", bases / "many", target_modules=QV)
    merge_to_hub(tmp_path / "adapter", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", hash=True)
    folder = Path(snapshot_download("ada/new"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(tokens).logits, trained(tokens).logits, rtol=1e-4, atol=1e-5)
    record = json.loads((folder / "fossil_export.json").read_text())
    kept = scene.files("ada/new")
    assert {entry["file"]: entry["sha256"] for entry in record["files"]} == {
        name: digest for name, (_, digest) in kept.items() if name.endswith(".safetensors")
    }
    assert all(entry["sha256"] == entry["hub_blob"] for entry in record["base"]["weights"])
    cli("verify", "ada/new", "--level", "weights", "--adapter", tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"revision": "tuned"}, {"create_pr": True}], ids=["branch", "pull request"])
def test_into_the_bases_own_repository(
    options: dict[str, Any], scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    scene.reset_log()
    head = scene.head("ada/many")
    result = merge_to_hub(bases / "qv", "ada/many", base="ada/many", cache_dir=tmp_path / "cache", **options)
    branch = "refs/pr/1" if "create_pr" in options else "tuned"
    assert published(scene, "ada/many", branch) == published(scene, "ada/pushed") and scene.head("ada/many") == head
    assert "# Base" in scene.read("ada/many", "README.md", branch).decode() and result.copied
    assert not any("duplicate" in seen.path for seen in scene.log)

    with pytest.raises(FossilExportError, match=r"is the base itself, .* choose another repository, or --revision"):
        merge_to_hub(bases / "qv", "ada/many", base="ada/many", cache_dir=tmp_path / "cache")
    assert scene.head("ada/many") == head and not list((tmp_path / "cache").rglob("*.*"))


def test_one_commit_is_read(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """The base's branch may move while its files are fetched, copied or looked at."""
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    names = [name for name in scene.files("ada/many") if name != ".gitattributes"]
    moved = Fault("PUT", before=lambda: scene.commit("ada/many", dict.fromkeys(names, b"{}"), delete=["LICENSE"]))
    scene.fault(moved)
    merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert moved.times == 0 and published(scene, "ada/new") == published(scene, "ada/pushed")


def test_a_base_that_training_quantized_is_streamed_as_it_saw_it(
    scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    """The card says so; a base that never is here as a whole is not measured, one that is here is."""
    seen = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options: dict[str, Any] = {"trained_on": seen | {"bnb_4bit_compute_dtype": "bfloat16"}}
    here = merge(bases / "qv", tmp_path / "merged", base=bases / "many", **options)
    plain = merge(bases / "qv", tmp_path / "plain", base=bases / "many")
    push(here.output, "ada/pushed")
    for number, base in enumerate(("ada/many", bases / "many")):
        repo = f"ada/streamed-{number}"
        result = merge_to_hub(bases / "qv", repo, base=base, cache_dir=tmp_path / "cache", **options)
        assert not result.plan.count("copy") or {move.way for move in result.plan.moves} == {"write", "copy"}
        weights = {name: found for name, found in published(scene, repo).items() if "safetensors" in name}
        assert weights == {name: published(scene, "ada/pushed")[name] for name in weights}
        assert "the base quantized to nf4, double quantization; merged into the base dequantized" in card(scene, repo)
        record = json.loads(scene.read(repo, "fossil_export.json"))
        assert record["trained_on"]["kind"] == "nf4" and ("quantization" in record) == (number == 1)
    assert any(
        (here.output / file.name).read_bytes() != (plain.output / file.name).read_bytes() for file in plain.plan.files
    )
