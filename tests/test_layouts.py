"""Weights that do not lie as torch.nn.Linear stores them: Conv1D, and layouts that a test brings."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models
from conftest import edit_json, make_adapter, make_base, randomise, weights
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fossil_export import FossilExportError, convert, merge, plan_merge, verify
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import LAYOUTS
from fossil_export.checkpoints.layouts._matrix import ReadRows, Rows, Stored
from fossil_export.checkpoints.layouts._transposed import MODEL_TYPES

CONV1D = ["c_attn", "c_proj", "c_fc"]
TOKENS = torch.arange(20).reshape(2, 10)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def gpt2(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


def trained_on_linears(base: Path, folder: Path, **config: Any) -> torch.nn.Module:
    """PEFT takes torch.nn.Linear alone: train on the same model with Linear in the place of Conv1D, which is live."""
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(module.nx, module.nf)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, MissConfig(target_modules=CONV1D, **config))
        randomise(live)
        live.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [{"r": 8}, {"r": 5}, {"r": 4, "init_weights": "mini", "mini_r": 8}, {"r": 8, "init_weights": "bat"}]
)
def test_conv1d_is_the_live_model(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", dtype)
    live = trained_on_linears(base, tmp_path / "adapter", **config)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result.plan.count("merge") == 8  # four layers in two blocks, the square ones among them
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    close = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(logits(ours), logits(live), rtol=close, atol=close)
    if dtype == torch.float32 and config["r"] != 5:
        # To the bit, the merge of the transposed weight.
        merged = live.merge_and_unload().state_dict()
        for name, value in weights(tmp_path / "merged").items():
            if re.search(r"c_\w+\.weight$", name) and "init_weights" not in config:
                assert torch.equal(value, merged[name].T)
    assert verify(tmp_path / "merged", level="weights").parity


def test_a_fault_in_a_transposed_weight_is_found(tmp_path: Path) -> None:
    trained_on_linears(gpt2(tmp_path / "base", torch.float32), tmp_path / "adapter", r=8)
    merge(tmp_path / "adapter", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.attn.c_proj.weight"][3, 5] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert "h.1.attn.c_proj.weight 1 of 1024 elements are off, the first at [5, 3]" in problem


def test_conv1d_as_lora_runs_in_peft(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", torch.float32)
    live = trained_on_linears(base, tmp_path / "adapter", r=8)
    convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sees Conv1D, and says so
        lora = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(live), rtol=1e-5, atol=1e-5)


def test_every_model_with_conv1d_is_known() -> None:
    """Asked of the installed transformers: whose modelling code imports Conv1D, and what their configs are called."""
    root = Path(transformers.models.__file__).parent
    found = set()
    for package in pkgutil.iter_modules([str(root)]):
        code = "".join(file.read_text() for file in (root / package.name).glob("modeling_*.py"))
        if re.search(r"^from .*pytorch_utils import .*\bConv1D\b", code, re.MULTILINE):
            config = importlib.import_module(f"transformers.models.{package.name}.configuration_{package.name}")
            found |= {
                value.model_type
                for name, value in vars(config).items()
                if isinstance(value, type) and name.endswith("Config") and getattr(value, "model_type", "")
            }
    assert found - set(MODEL_TYPES) <= {"clvp_encoder"} and "gpt2" in found  # its encoder has none of these layers


@dataclass(frozen=True)
class RowsOf:
    """Rows [start, start + count) of a tensor in which several weights are stacked."""

    info: TensorInfo
    start: int
    count: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.info.shape[1]

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def span(self) -> tuple[int, int]:
        width = self.info.shape[1]
        return self.start * width, (self.start + self.count) * width

    def unit(self, rows: int) -> int:
        return rows

    def read(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        return rows_of(self.info, self.start + start, self.start + stop)

    def write(self, rows: np.ndarray[Any, Any], start: int) -> Iterator[Stored]:
        yield Stored(self.info, (self.start + start) * self.shape[1], rows)

    def moved(self, info: TensorInfo) -> RowsOf:
        return RowsOf(info, self.start, self.count)


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


@dataclass(frozen=True)
class Expert:
    """One of the matrices (out, in) that lie in a tensor (experts, out, in)."""

    info: TensorInfo
    number: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    @property
    def shape(self) -> tuple[int, int]:
        _, outputs, inputs = self.info.shape
        return outputs, inputs

    @property
    def dtype(self) -> str:
        return self.info.dtype

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
        yield Stored(self.info, self.span[0] + start * self.shape[1], rows)

    def moved(self, info: TensorInfo) -> Expert:
        return Expert(info, self.number)


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
    config = {"peft_type": "MISS", "r": 8, "init_weights": init, "base_model_name_or_path": str(base)}
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
