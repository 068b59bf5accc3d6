"""LoRA adapters in graphs of the builders: the trained model in every mode, swapped by GenAI, head and embedding."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter
from graphs import error
from onnx_lora_tools import MODES
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fossil_export import FossilExportError, convert, export_onnx, verify
from fossil_export.onnx.builders import BUILDERS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that GenAI's builder can read."""
    base = tmp_path_factory.mktemp("llama") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 120}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(base)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(120)}, unk_token="w0"))  # type: ignore[no-untyped-call]
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def llama_lora(llama: Path) -> Path:
    """Trained on all linear layers, the head too, in several ranks."""
    folder = llama.parent / "lora"
    patterns = {"rank_pattern": {"q_proj": 3, "lm_head": 2}, "alpha_pattern": {"v_proj": 5}}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    make_adapter(folder, llama, kind=LoraConfig, lora_alpha=13, target_modules=targets, **patterns)
    return folder


@pytest.fixture(scope="module")
def plain(llama: Path) -> Callable[[str], Path]:
    """Plain graphs, each made once: of a builder, or of one and a precision."""

    @functools.cache
    def made(what: str) -> Path:
        runtime, _, precision = what.partition(" ")
        if runtime == "genai":
            pytest.importorskip("onnxruntime_genai")
        return BUILDERS[runtime].build(llama, llama.parent / what, precision or "fp32", "cpu")

    return made


@pytest.mark.parametrize("what", ["torch", "genai", "genai int4"])
@pytest.mark.parametrize("mode", MODES)
def test_graphs_of_both_builders_are_the_trained_model(
    mode: str, what: str, plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    coded = what.endswith("int4")
    if coded and mode in ("merged", "tiled"):
        with pytest.raises(FossilExportError, match="are quantized, and shards cannot be added to codes"):
            export_onnx(llama_lora, tmp_path / "out", mode=mode, onnx=plain(what))
        return
    result = export_onnx(llama_lora, tmp_path / "out", mode=mode, onnx=plain(what), copy_data=True)
    found = verify(result.output, base=llama, adapter=llama_lora)
    assert found.parity, found.problems
    assert found.forward is not None and found.forward.artifact.relative_error < 1e-5
    if mode in ("fused", "swappable"):
        assert verify(result.output, base=llama, adapter=llama_lora, level="weights").parity
    if mode == "fused" and what == "torch":  # as if the alphas of the trainer had been others
        other = tmp_path / "other"
        shutil.copytree(llama_lora, other)
        edit_json(other / "adapter_config.json", alpha_pattern={"v_proj": 6})
        wrong = verify(result.output, base=llama, adapter=other)
        assert not wrong.parity and any("v_proj: its lora_B in the graph" in line for line in wrong.problems)
        assert wrong.forward is not None and wrong.forward.artifact.relative_error > 1e-4


def test_genai_swaps_adapters_of_both_kinds(
    plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    result = export_onnx(llama_lora, tmp_path / "out", mode="swappable", onnx=plain("genai"))
    make_adapter(tmp_path / "tile", llama)
    tile = convert(tmp_path / "tile", tmp_path / "tile.onnx_adapter", to="onnx-adapter", graph=result.output).output
    model = og.Model(str(result.output))
    adapters = og.Adapters(model)
    for name, file in (("lora", result.adapter_file), ("tile", tile)):
        adapters.load(str(file), name)

    def logits(name: str | None) -> np.ndarray:
        generator = og.Generator(model, og.GeneratorParams(model))
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.arange(2, 9, dtype=np.int32))
        return np.array(generator.get_logits()).ravel()

    before = logits(None)
    for name, folder in (("lora", llama_lora), ("tile", tmp_path / "tile")):
        assert error(logits(name), _live(llama, folder)) < 1e-5
    assert np.array_equal(logits(None), before) and error(before, _live(llama, llama_lora)) > 1e-3


def test_a_head_is_the_bases_or_refused(
    plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """PEFT saves the weight of a head beside what it trained; nothing is said of it if it is the base's."""
    result = export_onnx(llama_lora, tmp_path / "out", mode="swappable", onnx=plain("torch"))
    assert not any("trained whole" in warning for warning in result.warnings)
    make_adapter(tmp_path / "none", llama, kind=LoraConfig, target_modules=["v_proj"])
    other = tmp_path / "other"
    shutil.copytree(llama_lora, other)
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, other / "adapter_model.safetensors")
    convert(tmp_path / "none", tmp_path / "none.onnx_adapter", to="onnx-adapter", graph=result.output)
    with pytest.raises(FossilExportError, match=r"differ in whole trained tensors \(lm_head.weight\)"):
        convert(other, tmp_path / "no", to="onnx-adapter", graph=result.output)


def _live(base: Path, adapter: Path) -> np.ndarray:
    """PEFT's own logits of the last position."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double().eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.arange(2, 9)[None]).logits[0, -1].numpy()
    return found


def test_an_embedding_is_merged_and_refused_elsewhere(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "lora", llama, kind=LoraConfig, target_modules=["embed_tokens", "q_proj"])
    assert verify(export_onnx(tmp_path / "lora", tmp_path / "merged", runtime="torch").output).parity
    for mode in ("tiled", "fused", "swappable"):
        with pytest.raises(FossilExportError, match=r"of model.embed_tokens \(lora_embedding\) is no .*--mode merged"):
            export_onnx(tmp_path / "lora", tmp_path / "no", mode=mode, runtime="torch")
    with pytest.raises(
        FossilExportError, match=r"more than weights of linear layers \(model.embed_tokens\).*--onnx out"
    ):
        export_onnx(tmp_path / "lora", tmp_path / "no", onnx=tmp_path / "merged")
