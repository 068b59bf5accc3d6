"""Layouts from elsewhere: rows of a fused tensor, and experts in one tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base, weights
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, merge, plan_merge, verify
from fossil_export.checkpoints import TensorInfo
from fossil_export.checkpoints.layouts import LAYOUTS, InOneTensor, ReadRows, Rows, Stored


@dataclass(frozen=True)
class RowsOf(InOneTensor):
    """Rows [start, start + count) of a tensor in which several weights are stacked."""

    start: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.info.shape[1]

    @property
    def span(self) -> tuple[int, int]:
        width = self.info.shape[1]
        return self.start * width, (self.start + self.count) * width

    def unit(self, rows: int) -> int:
        return rows

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        return rows_of(self.info, self.start + start, self.start + stop)

    def write(self, rows: np.ndarray[Any, Any], start: int) -> Iterator[Stored]:
        yield Stored((self.start + start) * self.shape[1], rows)


def stacked(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> RowsOf | None:
    """q, k and v of the fixture below in one tensor."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    info = tensors.get(f"{parent}.qkv.weight")
    places = {"q_proj": (0, 48), "k_proj": (48, 24), "v_proj": (72, 24)}
    return RowsOf(info, *places[last]) if info is not None and last in places else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
@pytest.mark.parametrize("cast", ["auto", "float16"])
def test_a_layout_from_elsewhere(
    targets: list[str], dtype: torch.dtype, cast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a fused tensor: one class and one entry, and merge and verify know it; the same bytes as apart."""
    plain = make_base(tmp_path / "plain", dtype, shards="10MB")
    make_adapter(tmp_path / "adapter", plain, target_modules=targets)
    fused = tmp_path / "fused"
    fused.mkdir()
    tensors = load_file(plain / "model.safetensors")
    for layer in range(2):
        parts = [tensors.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(parts)
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    (fused / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(FossilExportError, match="has no weights for"):
        plan_merge(tmp_path / "adapter", fused)
    monkeypatch.setitem(LAYOUTS, "stacked", stacked)
    result = merge(tmp_path / "adapter", tmp_path / "merged", base=fused, dtype=cast)
    merge(tmp_path / "adapter", tmp_path / "wanted", base=plain, dtype=cast)
    ours, wanted = weights(tmp_path / "merged"), weights(tmp_path / "wanted")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn."
        parts = [wanted[f"{name}{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(ours[f"{name}qkv.weight"], torch.cat(parts))
        assert torch.equal(ours[f"{name}o_proj.weight"], wanted[f"{name}o_proj.weight"])
    assert result.plan.count("merge") == 2 + 2 * ("o_proj" in targets)
    found = verify(tmp_path / "merged", base=fused, level="weights")
    assert found.parity and found.tensors is not None
    assert sum(check.elements for check in found.tensors if check.action == "merge") >= 2 * 96 * 48
    broken = load_file(tmp_path / "merged" / "model.safetensors")
    broken["model.layers.1.self_attn.qkv.weight"][80, 7] += 1
    save_file(broken, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    (problem,) = verify(tmp_path / "merged", base=fused, level="weights").problems
    assert "layers.1.self_attn.qkv.weight 1 of 4608 elements are off, the first at [80, 7]" in problem


def test_a_whole_tensor_and_a_part_of_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that an adapter brings would take the place of the one that the other's update is for."""
    monkeypatch.setitem(LAYOUTS, "stacked", stacked)
    base = tmp_path / "base"
    base.mkdir()
    whole = torch.randn(96, 48)
    save_file({"a.qkv.weight": whole, "a.out.weight": whole.clone()}, base / "model.safetensors", {"format": "pt"})
    shard = {"base_model.model.a.q_proj.miss_block": torch.ones(8, 48)}
    other = {"base_model.model.a.out.miss_block": torch.ones(8, 96)}
    brought = {"base_model.model.a.qkv.weight": whole + 1}
    for name, tensors in {"part": shard, "whole": other | brought, "both": shard | brought}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "MISS", "r": 8, "base_model_name_or_path": str(base), "target_modules": "all-linear"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    plan_merge(tmp_path / "part")
    for names in (["part", "whole"], ["both"]):
        with pytest.raises(FossilExportError, match=r"holds a\.qkv\.weight as a whole, which .* trained too"):
            plan_merge([tmp_path / name for name in names])
    quantized = base / "model.safetensors"
    save_file({"a.qkv.weight": whole.to(torch.int8)}, quantized, {"format": "pt"})
    monkeypatch.setattr(RowsOf, "dtype", "F32")  # a layout that reads quantized rows as floats
    with pytest.raises(FossilExportError, match="stored as I8: the base is quantized"):
        plan_merge(tmp_path / "part")


@dataclass(frozen=True)
class Expert(InOneTensor):
    """One of the matrices (out, in) that lie in a tensor (experts, out, in)."""

    number: int

    @property
    def shape(self) -> tuple[int, int]:
        _, outputs, inputs = self.info.shape
        return outputs, inputs

    @property
    def span(self) -> tuple[int, int]:
        size = self.shape[0] * self.shape[1]
        return self.number * size, (self.number + 1) * size

    def unit(self, rows: int) -> int:
        return rows

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        found: Rows = rows_of(self.info, self.number, self.number + 1)[:].reshape(self.shape)[start:stop]
        return found

    def write(self, rows: np.ndarray[Any, Any], start: int) -> Iterator[Stored]:
        yield Stored(self.span[0] + start * self.shape[1], rows)


def expert(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Expert | None:
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.weight", name)
    info = tensors.get(f"{found[1]}.weight") if found else None
    return Expert(info, int(found[2])) if found and info is not None and int(found[2]) < info.shape[0] else None


@pytest.mark.parametrize("init", [True, "bat"])
def test_experts_of_one_tensor(init: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them trained, in any order, the others are the base's bytes."""
    monkeypatch.setitem(LAYOUTS, "expert", expert)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 16, 24, generator=generator)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({"mlp.experts.weight": whole, "norm.weight": torch.ones(3)}, base / "model.safetensors", {"format": "pt"})
    size = (2, 8, 8) if init == "bat" else (8, 16)
    trained = {number: torch.randn(size, generator=generator) * 0.1 for number in (3, 0)}
    save_file(
        {f"base_model.model.mlp.experts.{number}.miss_block": value for number, value in trained.items()},
        adapter / "adapter_model.safetensors",
    )
    named = {"base_model_name_or_path": str(base), "target_modules": "all-linear"}
    config = {"peft_type": "MISS", "r": 8, "init_weights": init} | named
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge(adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["mlp.experts.weight"]
    for number in range(5):
        if number not in trained:
            assert torch.equal(merged[number], whole[number])
        elif init == "bat":
            blocks = whole[number].reshape(2, 8, 3, 8).transpose(1, 2)
            update = (blocks @ trained[number][:, None] + trained[number][:, None]).transpose(1, 2).reshape(16, 24)
            torch.testing.assert_close(merged[number], whole[number] + update)
        else:
            assert torch.equal(merged[number], whole[number] + trained[number].T.repeat(1, 3))
    assert verify(tmp_path / "merged", level="weights").parity
