"""Trained matrices that are rows of a stored tensor, and saved tensors that are a part of one."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import randomise, weights
from fused_tools import Spot, exact, flipped, in_slabs, make, peft_layer, put
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import PermuteForRope

from fossil_export import merge, verify
from fossil_export.checkpoints._header import slice_of
from fossil_export.checkpoints.layouts import Order, fused_rows
from fossil_export.merging._change import Piece
from fossil_export.merging._layout import tensor_record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NUMPY["float64"] = np.float64
QKV = {"q": (0, 48), "k": (48, 24), "v": (72, 24)}


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    """A stored tensor of some weights, with what is between them, and what is done to each."""
    variant = draw(st.sampled_from(["tile", "mini", "bat"]))
    rank = draw(st.integers(1, 9))
    experts = draw(st.sampled_from([0, 0, 2, 3]))
    rows = draw(st.integers(1, 8)) * (rank if variant == "bat" else draw(st.sampled_from([1, 2, 4])))
    parts = []
    for _ in range(experts or draw(st.integers(1, 4))):
        if not experts:
            rows = draw(st.integers(1, 8)) * (rank if variant == "bat" else draw(st.sampled_from([1, 2, 4])))
        inner = draw(st.sampled_from([size for size in (1, 2, 3, 4) if rows % size == 0]))
        outer = draw(st.sampled_from([size for size in (1, 2, 5) if rows // inner % size == 0]))
        order = Order(rows // inner // outer, outer, inner) if draw(st.booleans()) else None
        gap = 0 if experts else draw(st.sampled_from([0, 0, 1, 3]))
        parts.append((rows, gap, order, draw(st.sampled_from(["", "s", "p", "sp"]))))
    common = math.gcd(rank, *(rows for rows, *_ in parts))
    return {
        "mini": draw(st.sampled_from([size for size in range(1, common + 1) if common % size == 0])),
        "variant": variant, "rank": rank, "experts": experts, "parts": parts,
        "width": draw(st.integers(1, 3)) * rank if variant == "bat" else draw(st.integers(rank, 3 * rank + 1)),
        "dtype": draw(st.sampled_from(list(DTYPES))), "cast": draw(st.sampled_from(["auto", *DTYPES])),
        "pickled": draw(st.booleans()), "slab": draw(st.sampled_from([64, 512, 1 << 22])),
        "seed": draw(st.integers(0, 1 << 30)),
    }  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(tensors(), st.data())
def test_any_part_of_a_tensor(case: dict[str, Any], data: st.DataObject) -> None:
    """Shards (s) and whole weights (p, under a shard too) go where they belong, in any order of rows, cut anywhere."""
    generator = torch.Generator().manual_seed(case["seed"])
    variant, rank, width = case["variant"], case["rank"], case["width"]
    total = sum(rows + gap for rows, gap, *_ in case["parts"])
    stored = torch.randn(total, width, generator=generator, dtype=torch.float64).to(DTYPES[case["dtype"]])
    target = case["dtype"] if case["cast"] == "auto" else case["cast"]
    wanted, truth = stored.double().numpy().astype(NUMPY[target]), stored.double().clone()
    own = {"tile": (), "mini": (rank, case["mini"]), "bat": (rank, rank)}[variant]
    sizes = {rows: own if variant == "mini" else (rows // rank, *own) if own else (rank, rows) for rows in range(99)}
    held, spots, first = {"other.miss_block": torch.ones(sizes[rank])}, {"other.weight": Spot("other", 0, rank)}, 0
    for number, (rows, gap, order, done) in enumerate(case["parts"]):
        first += gap
        spots[f"m{number}.weight"] = Spot("whole", first, rows, order)
        here = order or Order(1, 1, rows)
        table = stored[first : first + rows].reshape(here.groups, here.outer, here.inner, width)
        matrix = table.transpose(1, 2).reshape(rows, width)
        if "p" in done:
            matrix = torch.randn(rows, width, generator=generator)
            held[f"m{number}.base_layer.weight" if "s" in done else f"m{number}.weight"] = matrix
        wide = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        precise = matrix.double()
        if "s" in done:
            shard = torch.randn(sizes[rows], generator=generator) * 0.5
            held[f"m{number}.miss_block"] = shard
            wide, precise = peft_layer(variant, wide, shard), exact(variant, precise, shard)
        back = [each.reshape(here.groups, here.inner, here.outer, width).transpose(1, 2) for each in (wide, precise)]
        if done:
            wanted[first : first + rows] = back[0].reshape(rows, width).numpy().astype(NUMPY[target])
            truth[first : first + rows] = back[1].reshape(rows, width)
        first += rows
    shape = (case["experts"], -1, width) if case["experts"] else (-1, width)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, base = Path(name), {"whole": stored.reshape(shape), "other": torch.ones(rank, rank)}
        init = {"init_weights": True if variant == "tile" else variant, "mini_r": case["mini"]}
        adapter = make(folder, base, held, case["pickled"], **init)
        put(patch, spots)
        in_slabs(patch, case["slab"])
        result = merge(adapter, folder / "merged", dtype=case["cast"])
        ours = weights(folder / "merged")["whole"]
        assert ours.dtype == DTYPES[target] and ours.shape == base["whole"].shape
        found = ours.reshape(total, width).double()
        expected = torch.from_numpy(wanted.astype(np.float64))
        step = 2.0 ** -{"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[target]
        torch.testing.assert_close(found, truth, rtol=step, atol=max(step, 2.0**-20))
        if variant != "bat":
            assert torch.equal(found, expected)
        dones = [done for *_, done in case["parts"]]
        (plan,) = [tensor for tensor in result.plan.tensors if tensor.name == "whole"]
        action = "copy" if target == case["dtype"] else "cast"
        assert plan.action == ("merge" if "s" in "".join(dones) else "replace" if any(dones) else action)
        assert len(tensor_record(plan).get("pieces", ())) == sum("p" in done for done in dones)
        if target == "float64" and any("s" in done and ("p" in done or case["dtype"] != target) for done in dones):
            return  # what is added in float32 and stored as float64 is no exact result rounded once
        assert verify(folder / "merged", level="weights").parity
        element = data.draw(st.integers(0, stored.numel() - 1))
        flipped(folder / "merged", "whole", element)
        (problem,) = verify(folder / "merged", level="weights").problems
        assert f"whole 1 of {stored.numel()} elements are off" in problem
        if total > case["parts"][0][0]:
            place = f"[{element}]" if case["experts"] else f"[{element // width}, {element % width}]"
            assert f"the first at {place}" in problem


def fused(plain: Path, folder: Path) -> Path:
    """The base with q, k and v in one tensor, and their biases in another."""
    shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    for layer in range(2):
        for kind in ("weight", "bias"):
            names = [f"model.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            tensors[f"model.layers.{layer}.self_attn.qkv.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def spots_of_qkv() -> dict[str, Spot]:
    found: dict[str, Spot] = {}
    for name in [f"model.layers.{layer}.self_attn." for layer in range(2)]:
        for part, (first, count) in QKV.items():
            found |= {
                f"{name}{part}_proj.{kind}": Spot(f"{name}qkv.{kind}", first, count) for kind in ("weight", "bias")
            }
    return found


def trained_qkv(folder: Path, base: Path, targets: list[str], **config: Any) -> Path:
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    peft = get_peft_model(model, MissConfig(r=8, target_modules=targets, **config))
    randomise(peft)
    peft.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("init", [{}, {"init_weights": "mini", "mini_r": 8}, {"init_weights": "bat"}])
@pytest.mark.parametrize("cast", ["auto", "float16"])
def test_a_real_model_with_fused_projections(
    init: dict[str, Any], cast: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained by PEFT with its biases; the same bytes as merged into the projections apart, files cut anew or not."""
    adapter = trained_qkv(tmp_path / "adapter", llama, ["q_proj", "v_proj", "k_proj"], bias="miss_only", **init)
    base = fused(llama, tmp_path / "fused")
    merge(adapter, tmp_path / "apart", base=llama, dtype=cast)
    put(monkeypatch, spots_of_qkv())
    result = merge(adapter, tmp_path / "merged", base=base, dtype=cast, max_shard_size="10KB")
    assert len(result.plan.files) > 2
    wanted = load_file(fused(tmp_path / "apart", tmp_path / "wanted") / "model.safetensors")
    ours = weights(tmp_path / "merged")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert result.plan.count("merge") == result.plan.count("replace") == 2
    assert verify(tmp_path / "merged", base=base, level="weights").parity


@pytest.mark.parametrize("inverse", [False, True])
def test_the_order_of_transformers(inverse: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, with their biases, as a checkpoint has them that transformers permutes when it loads it, and back."""
    name = "model.layers.0.self_attn.q_proj"
    config = LlamaConfig.from_pretrained(llama)
    forth, back = PermuteForRope(inverse=inverse), PermuteForRope(inverse=not inverse)
    adapter = trained_qkv(tmp_path / "adapter", llama, ["q_proj"], bias="miss_only", layers_to_transform=[0])
    merge(adapter, tmp_path / "apart", base=llama)
    wanted, base = load_file(tmp_path / "apart" / "model.safetensors"), tmp_path / "base"
    shutil.copytree(llama, base)
    tensors = load_file(llama / "model.safetensors")
    for kind in ("weight", "bias"):
        tensors[f"{name}.{kind}"] = back._permute_for_rope(tensors[f"{name}.{kind}"], config)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    order = Order(4, 6, 2).inverse if inverse else Order(4, 6, 2)
    put(monkeypatch, {f"{name}.{kind}": Spot(f"{name}.{kind}", 0, 48, order) for kind in ("weight", "bias")})
    merge(adapter, tmp_path / "merged", base=base)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for kind in ("weight", "bias"):
        assert not torch.equal(ours[f"{name}.{kind}"], wanted[f"{name}.{kind}"])
        assert torch.equal(forth._permute_for_rope(ours[f"{name}.{kind}"], config), wanted[f"{name}.{kind}"])
    assert verify(tmp_path / "merged", base=base, level="weights").parity
    flipped(tmp_path / "merged", f"{name}.bias", 9)
    (problem,) = verify(tmp_path / "merged", base=base, level="weights").problems
    assert f"{name}.bias 1 of 48 elements are off, the first at [9]" in problem


@pytest.mark.parametrize("variant", ["tile", "bat"])
def test_matrices_of_a_tensor_that_lie_transposed(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts (n, in, out), of which some were trained."""
    whole = torch.randn(4, 24, 16)
    shards = {number: torch.randn((4, 4, 4) if variant == "bat" else (5, 16)) for number in (0, 2)}
    held = {f"experts.{number}.miss_block": shard for number, shard in shards.items()}
    adapter = make(tmp_path, {"experts": whole}, held, init_weights="bat" if variant == "bat" else True)
    put(monkeypatch, {f"experts.{number}.weight": Spot("experts", number=number) for number in shards})
    merge(adapter, tmp_path / "merged")
    ours = weights(tmp_path / "merged")["experts"]
    for number in range(4):
        weight = whole[number].T
        if number in shards:
            weight = exact(variant, weight, shards[number]).float()
        torch.testing.assert_close(ours[number].T, weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1::2], whole[1::2])
    assert verify(tmp_path / "merged", level="weights").parity
    flipped(tmp_path / "merged", "experts", 2 * 24 * 16 + 3 * 16 + 5)
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert f"experts 1 of 1536 elements are off, the first at [{2 * 24 * 16 + 3 * 16 + 5}]" in problem


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("cast", ["auto", "bfloat16"])
def test_slices_of_a_saved_tensor(pickled: bool, cast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts trained whole as one tensor go into one tensor each, under a shard too; and halves into parts."""
    saved = torch.randn(3, 8, 6)
    stored = {f"experts.{number}.weight": torch.randn(8, 6).half() for number in range(3)}
    stored |= {"gates": torch.randn(5, 6), "more": torch.randn(4)}
    held = {"experts.weight": saved, "experts.1.miss_block": torch.randn(2, 8)}
    adapter = make(tmp_path, stored, held, pickled)

    def change(placement: Any, base: Any, adapter: Any) -> None:
        info = adapter.saved["experts.weight"]
        slices = {f"experts.{number}.weight": slice_of(info, 48 * number, 48, (8, 6)) for number in range(3)}
        placement.saved |= slices
        placement.into["experts.1.weight"] = fused_rows(slices["experts.1.weight"], 0, 8)
        placement.pieces["gates"] = (Piece(12, slice_of(slices["experts.2.weight"], 6, 12, (2, 6))),)

    put(monkeypatch, {"experts.1.weight": Spot("experts.1.weight", 0, 8)}, change)
    result = merge(adapter, tmp_path / "merged", dtype=cast)
    assert {tensor.name: tensor.action for tensor in result.plan.tensors if tensor.name != "more"} == {
        "experts.0.weight": "replace",
        "experts.1.weight": "merge",
        "experts.2.weight": "replace",
        "gates": "replace",
    }
    ours = weights(tmp_path / "merged")
    small, wide = (torch.bfloat16, torch.bfloat16) if cast != "auto" else (torch.float16, torch.float32)
    merged = (saved[1] + held["experts.1.miss_block"].T.repeat(1, 3)).to(small)
    assert torch.equal(ours["experts.0.weight"], saved[0].to(small))
    assert torch.equal(ours["experts.1.weight"], merged)
    assert torch.equal(ours["experts.2.weight"], saved[2].to(small))
    assert torch.equal(ours["gates"], torch.cat([stored["gates"][:2], saved[2, 1:3], stored["gates"][4:]]).to(wide))
    assert verify(tmp_path / "merged", level="weights").parity
    for name, element in {"experts.0.weight": 47, "experts.1.weight": 0, "gates": 13}.items():
        shutil.copytree(tmp_path / "merged", tmp_path / name)
        flipped(tmp_path / name, name, element)
        (problem,) = verify(tmp_path / name, level="weights").problems
        assert f"{name} 1 of {ours[name].numel()} elements are off" in problem
