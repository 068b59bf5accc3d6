"""The merged folder: the base's layout and bytes, loadable, with everything that belongs to the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter, make_base, weights
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import fossil_export
from fossil_export import merge, plan_merge
from fossil_export.checkpoints._header import read_header


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_the_bases_and_untouched_bytes_are_kept(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = contents(base), contents(tmp_path / "merged")
    assert set(after) == set(before) | {"fossil_export.json"}
    assert sum(name.endswith(".safetensors") for name in before) > 2
    touched = {f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")}
    assert set(result.survival) == touched
    for name, content in before.items():
        if not name.endswith(".safetensors"):
            assert after[name] == content
            continue
        header = read_header(base / name)
        assert after[name][: len(header.encoded)] == content[: len(header.encoded)] == header.encoded
        for tensor in header.tensors:
            assert tensor.offset is not None
            span = slice(tensor.offset, tensor.offset + tensor.nbytes)
            assert (after[name][span] == content[span]) == (tensor.name not in touched), tensor.name


def test_same_inputs_give_the_same_bytes_in_any_order(
    real_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(real_adapter, tmp_path / "one")
    monkeypatch.setattr("fossil_export.merging._memory.THREADS", 1)
    monkeypatch.setattr("fossil_export.merging._slabs.SLAB", 1 << 16)
    merge(real_adapter, tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    survival = [json.loads(folder.pop("fossil_export.json")) for folder in (one, two)]
    assert one == two
    # Sums over other slabs may differ in their last bits; everything else may not.
    for record in survival:
        for entry in [record["survival"], *record["tensors"]]:
            entry["survived"], entry["energy"] = round(entry["survived"], 9), round(entry["energy"], 9)
    assert survival[0] == survival[1]
    monkeypatch.undo()
    merge(real_adapter, tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_loads_in_transformers_and_gives_the_trained_logits(base: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.arange(20)[None]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(ours, trained(tokens).logits, rtol=1e-4, atol=1e-5)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():  # as a loader that reads only the index does
        with safe_open(tmp_path / "merged" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  the library's object is no dict


def test_real_answer(real_base: Path, real_adapter: Path, tmp_path: Path) -> None:
    import smollm2

    merge(real_adapter, tmp_path / "merged", base=real_base)
    assert smollm2.answer(tmp_path / "merged").startswith(smollm2.ANSWER)
    assert not smollm2.answer(real_base).startswith(smollm2.ANSWER)


@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("float16", torch.float16)])
def test_dtype_casts_every_tensor_and_says_so(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=name)
    make_adapter(tmp_path / "wide", base, dtype=torch.float32)
    before, after = weights(base), weights(tmp_path / "merged")
    for tensor, value in after.items():
        assert value.dtype == dtype
        shard = tmp_path / "adapter" / "adapter_model.safetensors"
        with safe_open(shard, "pt") as opened:
            key = f"base_model.model.{tensor.removesuffix('.weight')}.miss_block"
            expected = before[tensor].float()
            if key in opened.keys():  # noqa: SIM118
                expected = expected + opened.get_tensor(key).T.repeat(1, expected.shape[1] // 8)
        assert torch.equal(value, expected.to(dtype)), tensor
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == name
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype


def test_max_shard_size_cuts_anew(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "plain")
    merge(adapter, tmp_path / "cut", max_shard_size="100KB")
    merge(adapter, tmp_path / "one", max_shard_size="1GB")
    assert sorted(path.name for path in (tmp_path / "one").glob("*.safetensors*")) == ["model.safetensors"]
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 1 and all(sum(t.nbytes for t in read_header(path).tensors) <= 100_000 for path in files)
    expected = weights(tmp_path / "plain")
    for name in ("cut", "one"):
        got = weights(tmp_path / name)
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("size", ["0", "5", "five", "-3GB", "5XB", "0.1B", "", 0, 2.5, True])
def test_max_shard_size_must_be_a_size(size: Any, adapter: Path) -> None:
    with pytest.raises((fossil_export.FossilExportError, TypeError), match="5GB"):
        plan_merge(adapter, max_shard_size=size)


def test_base_may_be_one_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards="1GB")
    make_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "folder")
    merge(tmp_path / "adapter", tmp_path / "file", base=base / "model.safetensors")
    lone = tmp_path / "lone" / "model.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((base / "model.safetensors").read_bytes())
    merge(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "bare", base=lone)
    want = (tmp_path / "folder" / "model.safetensors").read_bytes()
    assert (tmp_path / "file" / "model.safetensors").read_bytes() == want
    assert (tmp_path / "file" / "config.json").is_file()
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"model.safetensors", "fossil_export.json"}
    assert (tmp_path / "bare" / "model.safetensors").read_bytes() == want


def test_weights_at_odd_offsets(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The format allows a header of any length, so that tensors may lie at any address."""
    merge(adapter, tmp_path / "plain")
    want = weights(tmp_path / "plain")
    for path in base.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    merge(adapter, tmp_path / "merged")
    for file in (tmp_path / "merged").glob("*.safetensors"):
        header = read_header(file)
        content = file.read_bytes()
        for tensor in header.tensors:
            assert tensor.offset is not None and tensor.offset % 4 == 3
            assert content[tensor.offset : tensor.offset + tensor.nbytes] == want[tensor.name].numpy().tobytes()


def test_stale_weights_stay_behind_and_everything_else_comes(base: Path, adapter: Path, tmp_path: Path) -> None:
    stale = [
        "model.safetensors.index.fp16.json",
        "X.GGUF",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "model-q4.gguf",
        "tf_model.h5",
        "README.md",
    ]
    kept = ["modeling_custom.py", "original/params.json", "images/logo.png"]
    hidden = [".git/config", ".gitattributes"]
    for name in [*stale, *kept, *hidden, "fossil_parity.json"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    (base / "consolidated.safetensors").write_bytes(next(base.glob("model-00001*")).read_bytes())
    result = merge(adapter, tmp_path / "merged")
    names = contents(tmp_path / "merged").keys()
    assert names >= set(kept) and not names & {*stale, *hidden, "consolidated.safetensors", "fossil_parity.json"}
    assert set(result.plan.left_behind) == {*stale, "consolidated.safetensors", "fossil_parity.json"}


def test_what_the_result_has_is_not_said_to_be_left_behind(base: Path, adapter: Path, tmp_path: Path) -> None:
    """One file of a base that has others, cut anew: the index of the others is no part of it, and its own has the
    name."""
    save_file(weights(base), base / "other.safetensors", {"format": "pt"})
    result = merge(adapter, tmp_path / "cut", base=base / "other.safetensors", max_shard_size="100KB")
    written = contents(tmp_path / "cut").keys()
    stale = {path.name for path in base.glob("model*")} - written
    assert "model.safetensors.index.json" in written and set(result.plan.left_behind) == stale


def test_links_within_the_folder_come_as_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "code").mkdir()
    (base / "code" / "code.py").write_text("pass")
    (base / "linked").symlink_to(base / "code")
    (base / "NOTICE").symlink_to("LICENSE")
    (base / "circle").symlink_to(base)
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "linked" / "code.py").read_text() == "pass"
    assert (tmp_path / "merged" / "NOTICE").read_text() == (base / "LICENSE").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    assert not (tmp_path / "merged" / "circle").exists()


def test_sentence_transformers_keeps_the_weights_of_its_other_modules(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "modules.json").write_text("[]")
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "config.json").write_text("{}")
    (base / "2_Dense" / "model.safetensors").write_bytes(b"weights of another module")
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "2_Dense" / "model.safetensors").read_bytes() == b"weights of another module"
    # A folder that is no module of such a model, and a model that is none, keep no other weights.
    (base / "old").mkdir()
    (base / "old" / "model.safetensors").write_bytes(b"of an older one")
    assert "old/model.safetensors" in merge(adapter, tmp_path / "again").plan.left_behind
    (base / "modules.json").unlink()
    plan = merge(adapter, tmp_path / "plain").plan
    assert {"old/model.safetensors", "2_Dense/model.safetensors"} <= {*plan.left_behind}


@pytest.mark.parametrize("paths", [["", "1_LSTM", "2_Dense/"], ["", "./1_LSTM", "2_Dense", 3]])
def test_modules_are_those_that_sentence_transformers_lists(
    paths: list[Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The recurrent module has its settings in lstm_config.json, and a checkpoint of a run is no module."""
    (base / "modules.json").write_text(json.dumps([{"idx": at, "path": path} for at, path in enumerate(paths)]))
    for name in ("1_LSTM/lstm_config.json", "2_Dense/config.json", "checkpoint-5/config.json"):
        (base / name).parent.mkdir()
        (base / name).write_text("{}")
        (base / name).with_name("model.safetensors").write_bytes(name.encode())
    plan = merge(adapter, tmp_path / "merged").plan
    for name in ("1_LSTM", "2_Dense"):
        assert (tmp_path / "merged" / name / "model.safetensors").read_bytes().startswith(name.encode())
    assert "checkpoint-5/model.safetensors" in plan.left_behind


def test_trained_tokenizer_replaces_the_bases(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text('{"trained": true}')
    merge(adapter, tmp_path / "incomplete")
    assert (tmp_path / "incomplete" / "tokenizer_config.json").read_text() == "{}"
    (adapter / "tokenizer.json").write_text('{"version": "trained"}')
    merge(adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "tokenizer.json").read_text()) == {"version": "trained"}
    # The template is part of the tokenizer: the base's would not be what the model was trained with.
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()
