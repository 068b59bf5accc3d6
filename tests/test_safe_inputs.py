"""Inputs that lead elsewhere, or change while they are read: links, files that a sync replaces or cuts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, DistilBertForMaskedLM, ElectraForMaskedLM

from fossil_export import convert, load_adapter, merge, plan_merge, push, verify
from fossil_export.adapters.quantized import quantized_training
from fossil_export.checkpoints.folder import LocalFolder
from fossil_export.checkpoints.header import read_header
from fossil_export.checkpoints.source import InputFile
from fossil_export.errors import AdapterError, CheckpointError, MergeError
from fossil_export.merging.api import run_plan

SECRET = "a secret of this machine"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder that is none of the model's business."""
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_ed25519").write_text(SECRET)
    (folder / "config.json").write_text(json.dumps({"secret": SECRET}))
    return folder


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "folder": lambda base, secrets: (base / "assets").symlink_to(secrets),
    "relative folder": lambda base, secrets: (base / "assets").symlink_to(os.path.relpath(secrets, base)),
    "file": lambda base, secrets: (base / "vocab.txt").symlink_to(secrets / "id_ed25519"),
    "link to a link": lambda base, secrets: _chain(base, secrets),
    "in a subfolder": lambda base, secrets: _below(base, secrets),
    "the folder above": lambda base, secrets: (base / "assets").symlink_to(".."),
}


def _chain(base: Path, secrets: Path) -> None:
    (base / ".hidden").symlink_to(secrets)
    (base / "assets").symlink_to(".hidden")


def _below(base: Path, secrets: Path) -> None:
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").symlink_to(secrets / "id_ed25519")


@pytest.mark.parametrize("kind", LINKS)
def test_links_out_of_a_base_are_refused(kind: str, base: Path, adapter: Path, secrets: Path, tmp_path: Path) -> None:
    LINKS[kind](base, secrets)
    with pytest.raises(CheckpointError, match=r"is a link to .*outside its folder") as refusal:
        merge(adapter, tmp_path / "merged")
    assert str(base) in str(refusal.value) and SECRET not in str(refusal.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_out_of_an_adapters_tokenizer_are_refused(
    name: str, base: Path, adapter: Path, secrets: Path, tmp_path: Path
) -> None:
    for other in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / other).write_text("{}")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(secrets / "id_ed25519")
    for run in (
        lambda: merge(adapter, tmp_path / "out"),
        lambda: convert(adapter, tmp_path / "out", to="lora"),
        lambda: convert(adapter, tmp_path / "out", to="miss"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: is a link to .*outside its folder"):
            run()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_an_adapter_are_refused(name: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name}: is a link to"):
        load_adapter(adapter)


def test_a_link_to_the_whole_folder_is_the_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(adapter)
    (tmp_path / "base-link").symlink_to(base)
    merge(tmp_path / "latest", tmp_path / "merged", base=tmp_path / "base-link")
    assert verify(tmp_path / "merged", level="weights").parity


def test_links_are_not_offered_for_upload(base: Path, adapter: Path, secrets: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "assets").symlink_to(secrets)
    with pytest.raises(CheckpointError, match="assets: is a link to"):
        push(tmp_path / "merged", "ada/model")


@pytest.mark.parametrize("folder", ["blobs", "models--org--x/blobs"])
def test_a_folder_called_blobs_is_no_hub_cache(folder: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "secret").write_text(SECRET)
    (base / "notes.txt").symlink_to(tmp_path / folder / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        merge(adapter, tmp_path / "merged")


def _replace(path: Path) -> None:
    """Another file of the same header in its place, as a sync leaves it."""
    content = bytearray(path.read_bytes())
    content[-4:] = b"\0\0\0\1"
    partial = path.with_name("incoming")
    partial.write_bytes(content)
    partial.replace(path)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def _write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES = {"replaced": _replace, "cut": _cut, "written into": _write_into, "grown": _grow, "removed": Path.unlink}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["base", "adapter", "tokenizer"])
def test_a_file_that_changes_after_the_plan_stops_the_merge(
    which: str, change: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "vocab.txt").write_text("a vocabulary of a hundred words or so, " * 4)
    path = {
        "base": sorted(base.glob("*.safetensors"))[0],
        "adapter": adapter / "adapter_model.safetensors",
        "tokenizer": base / "vocab.txt",
    }[which]
    plan = plan_merge(adapter)
    CHANGES[change](path)
    with pytest.raises((CheckpointError, AdapterError), match=f"{path.name}: (changed while|cannot be read)"):
        run_plan(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changes_during_the_merge_stops_it(change: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The last file of the base, while the first is merged; and each of them, after its first slab."""
    for path in sorted(base.glob("*.safetensors")):
        kept = path.read_bytes()
        done = []

        def once(nbytes: int, path: Path = path, done: list[int] = done) -> None:
            if not done:
                CHANGES[change](path)
            done.append(nbytes)

        with pytest.raises(CheckpointError, match=f"{path.name}: (changed while|cannot be read)"):
            merge(adapter, tmp_path / "merged", progress=once)
        assert not (tmp_path / "merged").exists()
        path.write_bytes(kept)


def test_a_file_cut_under_the_reader_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """In a process of its own, which a read through a map would have killed."""
    save_file({"weight": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    script = """
import os, sys
from pathlib import Path
import numpy as np
from fossil_export.adapters.quantized import quantized_training
from fossil_export.checkpoints.header import read_header
from fossil_export.checkpoints.source import InputFile
from fossil_export.errors import CheckpointError
path = Path(sys.argv[1])
header = read_header(path)
file = InputFile(path, header)
os.truncate(path, 4096)
try:
    file.read(header.tensors[0].offset, np.empty(1 << 22, np.uint8))
except CheckpointError as problem:
    print(problem)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "changed while it was being read" in done.stdout


def test_a_file_cut_while_it_is_copied_is_the_same_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Untouched ranges go to the system through a map; it has no pages for what is gone."""
    big = {"untouched": torch.randn(3 << 20)}
    save_file(big | load_file(sorted(base.glob("*.safetensors"))[0]), base / "model.safetensors")
    header = read_header(base / "model.safetensors")
    file = InputFile(header.path, header)
    whole = file.view(0, header.size)
    os.truncate(header.path, 1 << 20)
    target = os.open(tmp_path / "copy", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="Bad address"):
        for start in range(0, header.size, 1 << 20):
            os.pwrite(target, whole[start : start + (1 << 20)].data, start)
    os.close(target)
    del whole
    with pytest.raises(CheckpointError, match="changed while"):
        file.check()
    file.close()


@pytest.mark.parametrize("change", ["replaced", "written into"])
def test_verify_does_not_judge_a_base_that_changes(change: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    done: list[int] = []
    path = sorted(base.glob("*.safetensors"))[0]

    def once(nbytes: int) -> None:
        if not done:
            CHANGES[change](path)
        done.append(nbytes)

    with pytest.raises(CheckpointError, match="changed while"):
        verify(tmp_path / "merged", level="weights", progress=once)


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
    with pytest.raises(
        MergeError, match=r"has no model.layers.0.mlp.up_proj.weight.*qweight, scales: the base is quan"
    ):
        plan_merge(adapter)


HEADS = {
    "cls.predictions.decoder": BertForMaskedLM,  # stored with nothing of the head
    "vocab_projector": DistilBertForMaskedLM,  # with its bias alone
    "generator_lm_head": ElectraForMaskedLM,
}


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_of_an_unknown_name_is_refused(head: str, tmp_path: Path) -> None:
    kind = HEADS[head]
    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    kind(kind.config_class(**sizes, num_attention_heads=2, dim=32)).save_pretrained(tmp_path / "base")
    assert f"{head}.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    shards = {f"base_model.model.{head}.miss_block": torch.ones(4, 64)}
    save_file(shards, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "MISS", "r": 4, "target_modules": [head], "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(MergeError, match=re.escape(head)):
        plan_merge(tmp_path / "adapter", tmp_path / "base")


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


def test_links_on_the_way_to_a_graphs_data_are_refused(tmp_path: Path, secrets: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "sub").symlink_to(secrets)
    with pytest.raises(CheckpointError, match="outside its folder"):
        LocalFolder(folder).check_links(["sub/id_ed25519"])


def test_a_hidden_shard_is_none_of_the_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    index = next(base.glob("*.index.json"))
    first = sorted(base.glob("*.safetensors"))[0]
    first.rename(tmp_path / "other.safetensors")
    (base / f".{first.name}").symlink_to(tmp_path / "other.safetensors")
    index.write_text(index.read_text().replace(first.name, f".{first.name}"))
    with pytest.raises(CheckpointError, match="which is missing"):
        merge(adapter, tmp_path / "merged")


def _cut_on_first_view(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Cut `path` as soon as a piece of any file was asked for, which a map would answer with a signal."""
    view = LocalFolder.view

    def cutting(self: LocalFolder, name: str, offset: int, nbytes: int) -> object:
        found = view(self, name, offset, nbytes)
        os.truncate(path, 0)
        return found

    monkeypatch.setattr(LocalFolder, "view", cutting)


@pytest.mark.parametrize("target", ["lora", "miss"])
def test_an_adapter_cut_while_it_is_converted_is_an_error(
    target: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_on_first_view(monkeypatch, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="changed while it was being read"):
        convert(adapter, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("target", ["lora", "miss"])
def test_an_adapter_that_changes_while_it_is_converted_is_an_error(
    target: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fossil_export.converting import api

    write = api.TARGETS[target].write

    def changing(*arguments: Any) -> Any:
        found = write(*arguments)
        _write_into(adapter / "adapter_model.safetensors")
        return found

    monkeypatch.setitem(api.TARGETS, target, replace(api.TARGETS[target], write=changing))
    with pytest.raises(AdapterError, match="changed while it was being read"):
        convert(adapter, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [_cut, _write_into, _replace])
def test_a_pickled_adapter_that_changes_after_it_was_read_is_an_error(
    change: Callable[[Path], None], adapter: Path, tmp_path: Path
) -> None:
    weights = adapter / "adapter_model.bin"
    torch.save(load_file(adapter / "adapter_model.safetensors"), weights)
    (adapter / "adapter_model.safetensors").unlink()
    loaded = load_adapter(adapter)
    change(weights)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        merge(loaded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    next(iter(loaded.pickled.values())).sum()  # what a map of a cut file would answer with a signal


def test_two_heads_of_which_another_one_was_resized_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(30, 16)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    prefix = "base_model.model"
    tensors = {f"{prefix}.lm_head.miss_block": torch.zeros(2, 30), f"{prefix}.embed_out.weight": torch.zeros(32, 16)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "MISS", "r": 2, "modules_to_save": ["embed_out"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="trained with 32 tokens"):
        plan_merge(adapter)
