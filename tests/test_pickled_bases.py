"""Bases in PyTorch's own files, against the same bases as safetensors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickled_bases import merged_as, pickled_base, plain_base, read_all, values_of, write_state
from quantized_bases import fp8_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fossil_export
from fossil_export.checkpoints._checkpoint import view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError
from fossil_export.merging import plan_merge


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_base(tmp_path_factory.mktemp("base") / "plain")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("files", [1, 3])
def test_a_merge_is_that_into_the_same_base_as_safetensors(
    files: int, zipped: bool, plain: Path, tmp_path: Path
) -> None:
    base = pickled_base(plain, tmp_path / "pickled", files, zipped)
    merged = merged_as(base, plain, tmp_path)
    names = {path.name for path in merged.iterdir() if "model" in path.name}
    wanted = {"model.safetensors"}
    if files > 1:
        wanted = {f"model-0000{number}-of-0000{files}.safetensors" for number in range(1, files + 1)}
        wanted.add("model.safetensors.index.json")
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == wanted - {"model.safetensors.index.json"}
    assert names == wanted
    with safe_open(merged / min(wanted), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=base, level="weights")
    assert verdict.parity, verdict.problems
    record = json.loads((merged / "fossil_export.json").read_text())
    assert {entry["file"] for entry in record["base"]["weights"]} == {
        path.name for path in base.iterdir() if path.suffix == ".bin"
    }


def test_verify_runs_the_trainer_on_a_pickled_base(plain: Path, tmp_path: Path) -> None:
    base = pickled_base(plain, tmp_path / "pickled")
    merged = merged_as(base, plain, tmp_path)
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=base)
    assert verdict.parity, verdict.problems


def test_views_of_shared_storages_and_tensors_in_another_order(plain: Path, tmp_path: Path) -> None:
    state = load_file(plain / "model.safetensors")
    down, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    whole = torch.cat([state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"])
    changed = dict(state)
    for name, part in zip("qkv", whole.split([256, 128, 128]), strict=True):
        changed[f"model.layers.0.self_attn.{name}_proj.weight"] = part  # three views of one storage
    changed[down] = state[down].T.contiguous().T
    stepped = torch.zeros(2 * len(state[up]), state[up].shape[1], dtype=torch.bfloat16)
    stepped[::2] = state[up]
    changed[up] = stepped[::2]
    changed["model.norm.weight"] = torch.ones(1, dtype=torch.bfloat16).expand(256)
    state["model.norm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    for folder, one in (("pickled", changed), ("other", state)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((plain / "config.json").read_bytes())
        write_state(
            tmp_path / folder, {name: value.contiguous() for name, value in one.items()} if folder == "other" else one
        )
    merged = merged_as(tmp_path / "pickled", tmp_path / "other", tmp_path)
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=tmp_path / "pickled", level="weights")
    assert verdict.parity, verdict.problems
    actions = {one.name: one.action for one in plan_merge(tmp_path / "adapter", tmp_path / "pickled").tensors}
    assert actions["model.norm.weight"] == "copy" and actions[down] == "merge"


def test_a_tied_tensor_that_is_stored_twice_is_written_under_both_names(tmp_path: Path) -> None:
    plain = plain_base(tmp_path / "plain", tied=True)
    state = load_file(plain / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    base = pickled_base(plain, tmp_path / "pickled")
    write_state(base, state)
    merged = merged_as(base, base, tmp_path)
    found = read_all(merged)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(merged).lm_head.weight, found["lm_head.weight"])
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=base, level="weights")
    assert verdict.parity, verdict.problems


def test_a_base_in_another_dtype(plain: Path, tmp_path: Path) -> None:
    merged_as(pickled_base(plain, tmp_path / "pickled", 2), plain, tmp_path, dtype="float32")


def test_files_cut_anew(plain: Path, tmp_path: Path) -> None:
    merged = merged_as(pickled_base(plain, tmp_path / "pickled"), plain, tmp_path, max_shard_size="700KB")
    assert len(list(merged.glob("model-*.safetensors"))) > 1


def test_safetensors_win_over_pickles(plain: Path, tmp_path: Path) -> None:
    base = pickled_base(plain, tmp_path / "both")
    (base / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    assert [header.path.name for header in open_checkpoint(base).files] == ["model.safetensors"]
    (base / "model.safetensors").rename(base / "other.safetensors")
    assert [header.path.name for header in open_checkpoint(base).files] == ["pytorch_model.bin"]


def test_a_file_that_is_named_is_taken_beside_others(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(3)}, tmp_path / "other.bin")
    assert set(open_checkpoint(tmp_path / "other.bin").tensors) == {"other"}
    assert open_checkpoint(tmp_path).tensors.keys() == tensors.keys()


def test_what_training_left_is_not_taken_for_the_model(plain: Path, tmp_path: Path) -> None:
    base = pickled_base(plain, tmp_path / "base")
    (base / "pytorch_model.bin").rename(base / "weights.pt")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save({"a": torch.ones(1)}, base / name)
    assert [header.path.name for header in open_checkpoint(base).files] == ["weights.pt"]
    torch.save({"a": torch.ones(1)}, base / "more.pt")
    with pytest.raises(CheckpointError, match=r"has weights only as more\.pt, weights\.pt and no index"):
        open_checkpoint(base)
    assert open_checkpoint(base / "weights.pt").folder == base


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"]
OTHERS = ["bool", "int16", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64"]


def bytes_of(value: torch.Tensor) -> bytes:
    flat = torch.empty(value.shape, dtype=value.dtype).copy_(value).flatten()
    return flat.view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_tensor_is_what_pytorch_loads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("file")
    zipped = data.draw(st.booleans())
    state = {}
    for number in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        dtype = data.draw(st.sampled_from(DTYPES))
        value = torch.randint(-99, 99, shape).to(getattr(torch, dtype))
        order = data.draw(st.permutations(range(len(shape))))
        steps = tuple(slice(data.draw(st.integers(0, size - 1)), None, data.draw(st.integers(1, 3))) for size in shape)
        value = value.permute(order) if data.draw(st.booleans()) else value[steps]
        if data.draw(st.booleans()):
            value = value[:1].expand(3, *value.shape[1:])
        state[f"t{number}"] = torch.nn.Parameter(value, requires_grad=False) if data.draw(st.booleans()) else value
        if data.draw(st.booleans()):
            state[f"again{number}"] = value
    if data.draw(st.booleans()):
        kinds = OTHERS[:2] + OTHERS[-1:] if not zipped else OTHERS
        state["other"] = torch.ones(3, 2).to(getattr(torch, data.draw(st.sampled_from(kinds))))
    torch.save(state, folder / "weights.pt", _use_new_zipfile_serialization=zipped)
    loaded = torch.load(folder / "weights.pt", weights_only=True)
    checkpoint = open_checkpoint(folder / "weights.pt")
    assert list(checkpoint.tensors) == list(loaded)
    for name, value in loaded.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(value.shape)
        if name == "other":
            assert info.offset is not None
            raw = checkpoint.home.view("weights.pt", info.offset, info.nbytes)
            assert raw.tobytes() == bytes_of(value)
            continue
        assert values_of(checkpoint, name).tobytes() == bytes_of(value)
        for row in range(0, info.shape[0], 2):  # in parts
            part = read_rows(info, row, min(row + 2, info.shape[0]), partial(view_rows, checkpoint.home))[:]
            assert part.tobytes() == bytes_of(value[row : row + 2])


def test_a_base_that_is_written_to_while_it_is_merged_is_an_error(plain: Path, tmp_path: Path) -> None:
    from pickled_bases import adapter_for

    base = pickled_base(plain, tmp_path / "pickled")
    plan = plan_merge(adapter_for(plain, tmp_path / "adapter"), base)
    state = load_file(plain / "model.safetensors")
    write_state(base, {name: value + 1 for name, value in state.items()})
    with pytest.raises(CheckpointError, match="changed while"):
        fossil_export.run_merge(plan, tmp_path / "merged")


def test_a_quantized_base_in_pytorchs_files(tmp_path: Path) -> None:
    quantized, dequantized = fp8_folder(tmp_path)
    write_state(quantized, load_file(quantized / "model.safetensors"), 2)
    (quantized / "model.safetensors").unlink()
    merged = merged_as(quantized, dequantized, tmp_path)
    verdict = fossil_export.verify(merged, adapter=tmp_path / "adapter", base=quantized, level="weights")
    assert verdict.parity, verdict.problems


def test_a_value_head_beside_an_adapter_is_no_base(plain: Path, tmp_path: Path) -> None:
    torch.save({"v_head.summary.weight": torch.ones(1, 3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a base model"):
        open_checkpoint(tmp_path)
