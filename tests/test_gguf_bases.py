"""GGUF files as bases, against what transformers loads of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import smollm2
import torch
from gguf_bases import FAMILIES, Array, loaded, random, write
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_bases import adapter_for, merged_equal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import BloomTensorProcessor, LlamaTensorProcessor

import fossil_export
from fossil_export.checkpoints import gguf as gguf_files
from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints.gguf._coding import Blocks, Halves, Thirds, can_dequantize

KINDS = [kind.name for kind in gguf.GGMLQuantizationType if can_dequantize(kind.name)]
WIDTH, ROWS = 512, 48


def values(checkpoint: Checkpoint, name: str) -> Array:
    info = checkpoint.tensors[name]
    found: Array = read_rows(info, 0, info.shape[0], partial(view_rows, checkpoint.home))[:]
    return found


def same(found: Array, wanted: Any) -> bool:
    """Bit for bit."""
    wanted = np.asarray(wanted)
    return found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


def test_all_families_are_tested() -> None:
    assert set(FAMILIES) == set(gguf_files.FAMILIES)


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if not arch.endswith("moe")])
def test_the_model_is_what_transformers_loads_and_saves(arch: str, tmp_path: Path) -> None:
    path = write(tmp_path / "gguf" / "model.gguf", arch)
    plain = loaded(path, tmp_path / "plain")
    found = open_checkpoint(path.parent)
    wanted = load_file(plain / "model.safetensors")
    assert found.tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same(values(found, name), value), name
    small = [file for file in plain.iterdir() if file.suffix == ".json"]
    assert found.location == path and {"config.json", "tokenizer.json"} <= set(found.home.names())
    assert dict(found.config or {}) == json.loads((plain / "config.json").read_text())
    for file in small:
        assert json.loads(found.home.read(file.name)) == json.loads(file.read_text()), file.name


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    path = write(tmp_path / "gguf" / "model.gguf", "falcon", tied=False)  # which transformers' config ties
    plain = loaded(path, tmp_path / "plain")
    found, wanted = open_checkpoint(path), load_file(plain / "model.safetensors")
    assert found.tensors.keys() == wanted.keys() and "lm_head.weight" in wanted
    assert all(same(values(found, name), value) for name, value in wanted.items())
    own = json.loads((plain / "config.json").read_text())
    assert own["tie_word_embeddings"] is True
    assert found.config == json.loads(found.home.read("config.json")) == own | {"tie_word_embeddings": False}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "gemma3"])
def test_a_merge_is_that_of_the_model_that_transformers_loads(arch: str, tmp_path: Path) -> None:
    base = write(tmp_path / "gguf" / "model.gguf", arch)
    merged_equal(base, loaded(base, tmp_path / "plain"), tmp_path)


@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_a_merge_into_other_types(kind: str, tmp_path: Path) -> None:
    base = write(tmp_path / "gguf" / "model.gguf", kind=kind)
    merged_equal(base, loaded(base, tmp_path / "plain"), tmp_path)


def test_a_merge_into_another_dtype_and_more_files(tmp_path: Path) -> None:
    base = write(tmp_path / "gguf" / "model.gguf", kind="Q5_K", tied=True)
    plain = loaded(base, tmp_path / "plain")
    adapter = adapter_for(plain, tmp_path / "adapter")
    found = []
    for name, one in (("of_gguf", base), ("of_plain", plain)):
        result = fossil_export.merge(adapter, tmp_path / name, base=one, dtype="bfloat16", max_shard_size="1MB")
        files = sorted(result.output.glob("*.safetensors"))
        assert len(files) > 1 and json.loads((result.output / "config.json").read_text())["dtype"] == "bfloat16"
        found.append({key: value for file in files for key, value in load_file(file).items()})
    assert found[0].keys() == found[1].keys() and "lm_head.weight" not in found[0]
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_trainer_of_a_verification_has_the_dtype_of_the_result(dtype: str, tmp_path: Path) -> None:
    base = write(tmp_path / "gguf" / "model.gguf")
    adapter = adapter_for(loaded(base, tmp_path / "plain"), tmp_path / "adapter")
    fossil_export.merge(adapter, tmp_path / "out", base=base, dtype=dtype)
    verdict = fossil_export.verify(tmp_path / "out", adapter=adapter, base=base)
    assert verdict.parity, verdict.problems
    assert verdict.forward is not None and verdict.forward.trainer_dtype == (
        "float32" if dtype == "auto" else "bfloat16"
    )


@pytest.mark.parametrize("arch", ["qwen2moe", "qwen3moe"])
def test_experts_are_saved_one_by_one(arch: str, tmp_path: Path) -> None:
    path = write(tmp_path / "gguf" / "model.gguf", arch)
    plain = loaded(path, tmp_path / "plain")
    checkpoint = open_checkpoint(path)
    found = {name: torch.from_numpy(values(checkpoint, name)) for name in checkpoint.tensors}
    single = tmp_path / "single"
    single.mkdir()
    save_file(found, single / "model.safetensors", {"format": "pt"})
    (single / "config.json").write_bytes(checkpoint.home.read("config.json"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in found
    # transformers joins them, and keeps them joined when it saves what it loaded of a GGUF file.
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (single, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def coded(kind: str, rows: int, seed: int, **options: Any) -> tuple[Blocks, Any, Array]:
    """A random matrix of a type, what reads its bytes, and its floats by gguf."""
    raw, _ = random(np.random.default_rng(seed), (rows, WIDTH), kind)
    data = raw.view(np.uint8).reshape(rows, -1)
    info = TensorInfo("blk.0.attn_q.weight", "U8", data.shape, Path("model.gguf"), 0)
    floats = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(rows, WIDTH)
    return Blocks(info, kind, WIDTH, **options), lambda info, start, stop: data[start:stop], floats


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(["", "halves", "thirds", "transposed"]), st.data())
def test_any_rows_of_any_type_are_those_of_the_library(kind: str, layout: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 9))
    options: dict[str, Any] = {}
    if layout == "halves":
        heads = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        options = {"order": Halves(ROWS // heads)}
    elif layout == "thirds":
        heads = data.draw(st.sampled_from([1, 2, 4, 8]))
        options = {"order": Thirds(heads, ROWS // 3 // heads)}
    elif layout:
        options = {"change": layout}
    coding, rows_of, wanted = coded(kind, ROWS, seed, **options)
    if layout == "halves":
        wanted = LlamaTensorProcessor({"num_attention_heads": heads, "num_key_value_heads": heads}).process(
            wanted, "blk.0.attn_q.weight"
        )[0]
    elif layout == "thirds":
        q, k, v = wanted.reshape(3, heads, -1, WIDTH)
        wanted = np.stack([q, k, v], 1).reshape(ROWS, WIDTH)
    elif layout:
        wanted = np.ascontiguousarray(wanted.T)
    start = data.draw(st.integers(0, len(wanted) - 1))
    stop = data.draw(st.integers(start + 1, len(wanted)))
    first = data.draw(st.integers(0, stop - start - 1))
    last = data.draw(st.integers(first + 1, stop - start))
    assert coding.width == wanted.shape[1]
    assert same(coding.open(rows_of, start, stop)(first, last), wanted[start + first : start + last])


def test_thirds_are_those_of_bloom() -> None:
    rows = np.arange(3 * 64, dtype=np.float32).repeat(64).reshape(3 * 64, 64)
    wanted = BloomTensorProcessor({"n_head": 4, "hidden_size": 64}).process(rows, "blk.0.attn_qkv.weight")[0]
    assert Thirds(4, 16).stored(0, 192).tolist() == wanted[:, 0].astype(int).tolist()


def test_the_real_model_merges_as_what_transformers_loads(real_base: Path, real_adapter: Path, tmp_path: Path) -> None:
    plain = smollm2.once("smollm2-135m-instruct-float32", lambda folder: void(loaded(smollm2.gguf(), folder)))
    merged = {}
    for name, base in (("of_gguf", smollm2.gguf()), ("of_plain", plain)):
        result = fossil_export.merge(real_adapter, tmp_path / name, base=base)
        assert not result.warnings and result.plan.count("merge") == 210
        merged[name] = load_file(result.output / "model.safetensors")
    assert merged["of_gguf"].keys() == merged["of_plain"].keys()
    assert all(torch.equal(merged["of_gguf"][name], value) for name, value in merged["of_plain"].items())
    small = sorted(file.name for file in real_base.iterdir() if not file.name.startswith("model"))
    assert {"tokenizer.json", "config.json"} <= set(small)
    for name in small:  # of the dequantized model that the demo trains on, in bfloat16
        found, wanted = ((folder / name).read_bytes() for folder in (tmp_path / "of_gguf", real_base))
        if name == "config.json":
            assert json.loads(found) == json.loads(wanted) | {"dtype": "float32"}
        else:
            assert found == wanted, name


def void(_: object) -> None:
    """What was made is in its folder."""
