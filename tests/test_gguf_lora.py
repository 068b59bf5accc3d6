"""GGUF LoRA files, read back with gguf's own reader and held against PEFT's update."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_tools
import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter
from gguf_tools import HEADS, KINDS, NAMES, Case, gguf_name, in_order, make, make_kind, refused, tensors, without_head
from safetensors.torch import load_file, save_file

from fossil_export.converting._gguf_base import FAMILIES

case = gguf_tools.case


def test_kinds_are_all_tested() -> None:
    assert set(FAMILIES) == {*KINDS, "gemma3"}  # gemma3 is gemma3_text within a model that also sees


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str, tmp_path: Path) -> None:
    expected = KINDS[kind]
    case = make(tmp_path, kind, r=10)  # divides neither width
    output = tmp_path / "adapter.gguf"
    details = case.write(output)
    found = tensors(output)
    modules = [
        f"model.layers.{layer}.{part}"
        for layer in range(2)
        for part in NAMES
        if part.rpartition(".")[2] in expected.targets
    ]
    assert set(found) == {f"{gguf_name(module)}.{end}" for module in modules for end in ("lora_a", "lora_b")}
    for module in modules:
        update = case.update(module)
        (kind_a, shape_a, a), (kind_b, shape_b, b) = (
            found[f"{gguf_name(module)}.{end}"] for end in ("lora_a", "lora_b")
        )
        assert (kind_a, kind_b) == ("F32", "F32")
        assert (shape_a, shape_b) == ((10, update.shape[1]), (len(update), 10))
        assert np.abs(update).max() > 0
        assert np.array_equal(in_order(b @ a, module, expected.rotary), update)
        if expected.rotary and module.endswith(("q_proj", "k_proj")):
            assert not np.array_equal(b @ a, update)
    reader = gguf.GGUFReader(output)
    keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("general", "adapter"))}
    assert keys["general.architecture"] == details["architecture"] == expected.architecture
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 10.0)
    assert (keys["general.name"], keys["general.base_model.0.name"]) == ("adapter", "base")
    assert keys["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert details == {
        "architecture": expected.architecture,
        "outtype": "f32",
        "rank": 10,
        "modules": len(modules),
        "exact": True,
        "relative_error": 0.0,
        "warnings": [],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "base"]


def test_mini(tmp_path: Path) -> None:
    case = make(tmp_path, r=8, init_weights="mini", mini_r=4)
    case.write(tmp_path / "adapter.gguf")
    found = tensors(tmp_path / "adapter.gguf")
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
        name = gguf_name(module)
        product = found[f"{name}.lora_b"][2] @ found[f"{name}.lora_a"][2]
        assert np.array_equal(in_order(product, module, True), case.update(module))


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_rounded(outtype: str, tmp_path: Path) -> None:
    case = make(tmp_path, r=32)
    details = case.write(tmp_path / "exact.gguf")
    exact = tensors(tmp_path / "exact.gguf")
    details = case.write(tmp_path / "rounded.gguf", outtype=outtype)
    rounded = tensors(tmp_path / "rounded.gguf")
    assert rounded.keys() == exact.keys()
    largest, kinds = 0.0, set()
    for name, (_, shape, values) in exact.items():
        kind, stored_shape, stored = rounded[name]
        assert stored_shape == shape
        kinds.add((kind, shape[-1] % 32 == 0))
        if kind == "Q8_0":
            blocks, codes = values.reshape(-1, 32), stored.reshape(-1, 32)
            # Half a step of 1/127 of the largest, and the float16 scale's own rounding on up to 127 steps.
            bound = np.abs(blocks).max(1, keepdims=True) * (0.5 / 127 + 2**-11)
            assert (np.abs(codes - blocks) <= bound * 1.001).all()
        else:
            assert np.array_equal(stored, values.astype(np.float16).astype(np.float32))
        if name.endswith("lora_b"):
            largest = max(largest, float(np.linalg.norm(stored - values) / np.linalg.norm(values)))
    assert kinds == ({("F16", True), ("F16", False)} if outtype == "f16" else {("Q8_0", True), ("F16", False)})
    assert details["relative_error"] == pytest.approx(largest, rel=1e-3)
    assert 0 < details["relative_error"] < (5e-4 if outtype == "f16" else 1e-2)
    assert not details["exact"]
    stay = "10 of 28 matrices stay f16" if outtype == "q8_0" else ""
    assert [warning[: len(stay)] for warning in details["warnings"]] == ([stay] if stay else [])
    written = gguf.GGUFReader(tmp_path / "rounded.gguf").fields["general.file_type"].contents()
    assert written == {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[outtype]


def test_the_ones_of_mini_are_rounded_too(tmp_path: Path) -> None:
    """q8_0 has no 1: it is 127 times a float16 that is near 1/127."""
    case = make(tmp_path, r=10, init_weights="mini", mini_r=4, target_modules=["down_proj"])
    weights = case.adapter / "adapter_model.safetensors"
    save_file({name: value.half().float() for name, value in load_file(weights).items()}, weights)
    details = case.write(tmp_path / "adapter.gguf", outtype="q8_0")
    kinds = {name.rpartition(".")[2]: kind for name, (kind, _, _) in tensors(tmp_path / "adapter.gguf").items()}
    assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"}
    assert not details["exact"] and 1e-5 < details["relative_error"] < 1e-3


def test_values_too_small_for_q8_0_are_told(tmp_path: Path) -> None:
    def faint(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    case = make(tmp_path, r=32, change=faint)
    warnings = case.write(tmp_path / "adapter.gguf", outtype="q8_0")["warnings"]
    assert "--outtype f32 keeps it" in warnings[1]


def test_bfloat16_shards_are_exact_in_f32(tmp_path: Path) -> None:
    base = make_kind(tmp_path / "base", "llama")
    trained = make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16, autocast=False)
    assert Case(base, tmp_path / "adapter", trained).write(tmp_path / "adapter.gguf")["exact"]
    shards = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shard = shards["base_model.model.model.layers.0.mlp.up_proj.miss_block"]
    assert shard.dtype == torch.bfloat16
    assert np.array_equal(
        tensors(tmp_path / "adapter.gguf")["blk.0.ffn_up.weight.lora_b"][2], shard.T.to(torch.float32).numpy()
    )


def test_head_of_its_own(tmp_path: Path) -> None:
    case = make(tmp_path, target_modules=["lm_head"])
    refused(r"\(lm_head.weight\).* save_embedding_layers=False\) if they are the base's own", case, tmp_path)
    without_head(case)
    case.write(tmp_path / "adapter.gguf")
    found = tensors(tmp_path / "adapter.gguf")
    assert set(found) == {"output.weight.lora_a", "output.weight.lora_b"}
    assert np.array_equal(found["output.weight.lora_b"][2] @ found["output.weight.lora_a"][2], case.update("lm_head"))


@pytest.mark.parametrize("head", ["model.language_model.", "language_model.model."])
def test_text_part_of_a_model_that_also_sees(head: str, tmp_path: Path) -> None:
    case = make(tmp_path, "gemma3_text")
    case.write(tmp_path / "plain.gguf")
    weights = case.adapter / "adapter_model.safetensors"
    renamed = {name.replace("model.layers.", f"{head}layers."): value for name, value in load_file(weights).items()}
    assert all(f"base_model.model.{head}layers." in name for name in renamed)
    save_file(renamed, weights)
    text = json.loads((case.base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    case.write(tmp_path / "adapter.gguf", base=None, base_config=tmp_path / "config.json")
    one, other = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "adapter.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name][2], other[name][2]) for name in one)


def test_config_alone_is_enough(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path / "whole.gguf")
    (tmp_path / "config").mkdir()
    (case.base / "config.json").rename(tmp_path / "config" / "config.json")
    case.write(tmp_path / "config.gguf", base=None, base_config=tmp_path / "config")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "config.gguf").read_bytes()


def test_config_that_does_not_tell_the_heads_of_the_keys(tmp_path: Path) -> None:
    """Old ones do not: there are as many as of the queries."""
    case = make(tmp_path, config={"num_key_value_heads": HEADS})
    case.write(tmp_path / "told.gguf")
    edit_json(case.base / "config.json", num_key_value_heads=...)
    case.write(tmp_path / "untold.gguf")
    assert (tmp_path / "told.gguf").read_bytes() == (tmp_path / "untold.gguf").read_bytes()
