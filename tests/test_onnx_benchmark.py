"""benchmarks/onnx_graphs.py runs on a tiny model, from the builder's graph to the tables."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_graphs
import pytest
import torch
from conftest import make_adapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("onnxruntime_genai")
SHAPES = ["prefill-1", "prefill-8", "decode-1", "decode-2"]
RANK = 8


def make_model(folder: Path) -> Path:
    """Two layers with heads of 16, as ONNX Runtime's attention wants them, and a tokenizer that GenAI reads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(128)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    return folder


def test_every_row_and_the_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, r=RANK)
    file, output = tmp_path / "found.json", tmp_path / "found.md"
    command = ["--precision", "fp32", "--rounds", "1", "--loads", "1", "--shapes", *SHAPES]
    command += ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--work", str(tmp_path / "work")]
    onnx_graphs.main([*command, "--json", str(file), "--output", str(output)])
    found = json.loads(file.read_text())["fp32"]

    branches = {"fused", "swappable, adapter", "LoRA", "LoRA, swappable"}
    names = {"merged", "merged again", "plain", "tiled", "swappable, none"} | branches
    assert set(found["runs"]) == set(SHAPES)
    for times in found["runs"].values():
        assert set(times) == names and all(len(values) == 1 and values[0] > 0 for values in times.values())
    assert set(found["loads"]) == {"plain", "plain again", "merged", "tiled", "fused", "swappable"}
    assert len(found["adapters"]) == 4 and all(len(values) >= 10 for values in found["adapters"].values())

    differences = found["differences"]
    assert differences["plain"] > 0.01, "the adapter does something"
    assert all(value < 1e-4 for name, value in differences.items() if name != "plain")

    qkv, mlp = 64 * (64 + 32 + 32), 3 * 64 * 96
    weights = 2 * (qkv + 64 * 64 + mlp) + 64 * 128
    outputs = 2 * (128 + 64 + 2 * 96 + 64)
    inputs = 2 * (64 + 64 + 2 * 64 + 96)
    for method, lines in (("FOSSIL", outputs), ("LoRA", inputs + outputs)):
        assert found["floors"][method]["arithmetic"] == pytest.approx(RANK * lines / weights)
        assert found["floors"][method]["bytes"] == pytest.approx(RANK * lines / weights)

    text = output.read_text()
    assert capsys.readouterr().out == text
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert names <= set(rows) and all(rows.count(name) >= 2 for name in branches)


def test_a_branch_that_is_off_is_noticed() -> None:
    class Fake:
        session = None

        def __init__(self, value: float) -> None:
            self.value = value

        def run(self, feeds: object) -> list[torch.Tensor]:
            return [torch.full((2, 3), self.value)]

    good = {name: Fake(1.0) for name in ("merged", "plain", "fused", "swappable, none")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graphs, "make_feeds", lambda *given: {})
        assert not any(onnx_graphs.check("fp32", good, 16).values())
        with pytest.raises(SystemExit, match="fused are off by"):
            onnx_graphs.check("fp32", good | {"fused": Fake(1.002)}, 16)
