"""GPT-2 and its kin, whose weights lie (in, out): Conv1D, against the live model."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers.models
from conftest import edit_json, randomise, weights
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

from fossil_export import convert, export_onnx, merge, verify
from fossil_export.checkpoints import TensorInfo
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints.layouts import LAYOUTS, find_matrix
from fossil_export.checkpoints.layouts._transposed import MODEL_TYPES, Transposed
from fossil_export.onnx.builders import BUILDERS

CONV1D = ["c_attn", "c_proj", "c_fc"]
SQUARE = "transformer.h.1.attn.c_proj.weight"
TOKENS = torch.arange(20).reshape(2, 10)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def gpt2(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


def trained_on_linears(base: Path, folder: Path, targets: list[str] = CONV1D, **config: Any) -> torch.nn.Module:
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
        live = get_peft_model(model, MissConfig(target_modules=targets, **config))
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
    if dtype == torch.float32:
        found = verify(tmp_path / "merged")
        assert found.parity and found.forward is not None and found.forward.artifact.top1 == 1.0


def test_a_fault_in_a_transposed_weight_is_found(tmp_path: Path) -> None:
    trained_on_linears(gpt2(tmp_path / "base", torch.float32), tmp_path / "adapter", r=8)
    merge(tmp_path / "adapter", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.attn.c_proj.weight"][3, 5] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert "h.1.attn.c_proj.weight 1 of 1024 elements are off, the first at [5, 3]" in problem


@pytest.mark.parametrize("told_by", ["no config", "no model_type", "another model_type"])
def test_a_square_weight_is_told_by_the_layers_beside_it(told_by: str, tmp_path: Path) -> None:
    """Its own sizes fit both ways: a base whose config does not say what it is must not become another model."""
    base = gpt2(tmp_path / "base", torch.float32)
    trained_on_linears(base, tmp_path / "adapter", r=8, targets=["attn.c_proj"])
    merge(tmp_path / "adapter", tmp_path / "wanted", base=base)
    if told_by == "no config":
        (base / "config.json").unlink()
    else:
        edit_json(base / "config.json", model_type=... if told_by == "no model_type" else "gpt2-of-ours")
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    ours, wanted = weights(tmp_path / "merged"), weights(tmp_path / "wanted")
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert not torch.equal(wanted[SQUARE], weights(base)[SQUARE])


def test_a_linear_of_the_same_name_stays_plain(tmp_path: Path) -> None:
    """GPT-BigCode calls its layers so, and stores them as torch.nn.Linear does."""
    tensors = {"h.0.attn.c_attn.weight": (96, 32), "h.0.attn.c_attn.bias": (96,), "h.0.attn.c_proj.weight": (32, 32)}
    infos = {name: TensorInfo(name, "F32", shape, tmp_path, 0) for name, shape in tensors.items()}
    for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"):
        assert isinstance(find_matrix(name, infos, {"model_type": "gpt_bigcode"}), type(find_matrix(name, infos, None)))
        assert find_matrix(name, infos, None) == LAYOUTS["plain"](name, infos, {})


def test_conv1d_as_lora_runs_in_peft(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", torch.float32)
    live = trained_on_linears(base, tmp_path / "adapter", r=8)
    convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sees Conv1D, and says so
        lora = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(live), rtol=1e-5, atol=1e-5)


def test_conv1d_in_graphs(tmp_path: Path) -> None:
    """A graph that PyTorch's exporter made of the base, in every mode against the live model."""
    base = gpt2(tmp_path / "base", torch.float32)
    live = trained_on_linears(base, tmp_path / "adapter", r=8)
    (tmp_path / "graph").mkdir()
    graph = BUILDERS["torch"].build(base, tmp_path / "graph", "fp32", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    feeds = {"input_ids": TOKENS.numpy(), "attention_mask": np.ones_like(TOKENS.numpy())}
    for mode in ("merged", "tiled", "fused", "swappable"):
        result = export_onnx(tmp_path / "adapter", tmp_path / mode, mode=mode, onnx=graph)
        with_adapter = ort.RunOptions()
        if result.adapter_file is not None:
            loaded = ort.LoraAdapter()
            loaded.Load(str(result.adapter_file))
            with_adapter.add_active_adapter(loaded)
        found = ort.InferenceSession(str(result.graph), options).run(["logits"], feeds, with_adapter)[0]
        np.testing.assert_allclose(found, logits(live).numpy(), rtol=1e-4, atol=1e-5)
    convert(tmp_path / "adapter", tmp_path / "x.onnx_adapter", to="onnx-adapter", graph=tmp_path / "swappable")


def test_a_decoder_of_conv1d_beside_another_encoder(tmp_path: Path) -> None:
    """The layers of each part lie as that part has them, the square ones too."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertConfig(**sizes, vocab_size=30)
    decoder = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    model.save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, (Conv1D, torch.nn.Linear)) and f"{name}.weight" in base.tensors:
            matrix = find_matrix(f"{name}.weight", base.tensors, base.config)
            assert isinstance(matrix, Transposed) == isinstance(module, Conv1D), name
            found += isinstance(module, Conv1D)
    assert found == 7  # two of self-attention, three of cross-attention, two of the feed-forward layer


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
