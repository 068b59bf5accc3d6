"""int4 graphs are judged by what they hold, not by how their runtime rounds the inputs of products."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, make_adapter
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from fossil_export import export_onnx, verify
from fossil_export.cli import main
from fossil_export.errors import OnnxError
from fossil_export.onnx.graph._file import load_graph
from fossil_export.verifying import _quantized
from fossil_export.verifying._bounds import Distance, judge_as_run
from fossil_export.verifying._onnx_models import OnnxRunner
from fossil_export.verifying._quantized import Codes, _exact_products, _scales

OUTLIERS = [0, 32]
"""Channels that are large and that no weight reads, one in each block of 32: 8 bits over a block leave little of the
others."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Llama, a LoRA and the swappable int4 graph of both, in a folder."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("outliers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 120}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        model.model.norm.weight[OUTLIERS] = 60.0
        model.lm_head.weight[:, OUTLIERS] = 0.0
    model.save_pretrained(folder / "base")
    _tokenizer().save_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    make_adapter(folder / "lora", folder / "base", kind=LoraConfig, lora_alpha=13, target_modules=targets)
    export_onnx(folder / "lora", folder / "graph", mode="swappable", precision="int4", runtime="genai")
    yield folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(120)}, unk_token="w0"))  # type: ignore[no-untyped-call]
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("w3 w17 w40 w5 w80 w2\nw9 w30 w99 w61\n")
    return path


def test_a_right_graph_is_the_trained_model_however_its_runtime_rounds(folder: Path, prompts: Path) -> None:
    report = folder / "report.html"
    files = {path: path.read_bytes() for path in (folder / "graph").iterdir()}
    done = CliRunner().invoke(
        main, ["verify", str(folder / "graph"), "--prompts", str(prompts), "--report", str(report)]
    )
    assert done.exit_code == 0, done.output
    certificate = json.loads((folder / "graph" / "fossil_parity.json").read_text())
    forward = certificate["forward"]
    assert forward["as_it_runs"]["relative_error"] > 0.05
    assert forward["artifact"]["relative_error"] < 1e-5 and forward["allowed_noise"] == 0
    assert "(products in full precision)" in done.stdout and "as it runs" in done.stdout
    assert "As it runs" in report.read_text()
    assert {path: path.read_bytes() for path in files} == files
    assert {*(folder / "graph").iterdir()} == {*files, folder / "graph" / "fossil_parity.json"}
    # The certificate knows graph and adapter by their hashes, and the weights, which may be large, by their size.
    assert certificate["hashes"]["artifact"] == [
        {"file": path.name, "size": len(data)}
        | ({} if path.name.endswith(".data") else {"sha256": sha256(data).hexdigest()})
        for path, data in sorted(files.items())
        if ".onnx" in path.name
    ]


def test_a_small_fault_is_seen_although_8_bits_would_hide_it(folder: Path, prompts: Path, tmp_path: Path) -> None:
    """As if the alphas of the trainer had been others: the logits move by less than rounding to 8 bits moves them."""
    other = tmp_path / "other"
    shutil.copytree(folder / "lora", other)
    edit_json(other / "adapter_config.json", alpha_pattern={"v_proj": 14})
    found = verify(folder / "graph", base=folder / "base", adapter=other, level="forward", prompts=prompts)
    assert found.forward is not None and found.forward.as_run is not None
    assert found.forward.artifact.relative_error < found.forward.as_run.relative_error
    assert not found.parity and found.forward.first_outside == "model.layers.0.self_attn.v_proj"
    assert "is rounding), first at" in found.problems[0]


def test_a_graph_of_full_precision_is_run_once(folder: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "graph", tmp_path / "graph")
    model = ir.load(tmp_path / "graph" / "model.onnx")
    _quantized.raise_level(model)
    ir.save(model, tmp_path / "graph" / "model.onnx")
    found = verify(tmp_path / "graph", base=folder / "base", adapter=folder / "lora", level="forward", prompts=prompts)
    assert found.parity and found.forward is not None and found.forward.as_run is None
    assert found.forward.continuations == 2 and "as_it_runs" not in found.to_dict()["forward"]


def test_what_cannot_be_run_in_full_precision_has_the_wide_bound(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: OnnxRunner) -> Any:
        raise OnnxError("no kernel for that level")

    monkeypatch.setattr(OnnxRunner, "_open_exact", refuse)
    given = {"base": folder / "base", "adapter": folder / "lora", "level": "forward", "prompts": prompts}
    found = verify(folder / "graph", **given)
    assert found.forward is not None and found.forward.noise == _quantized.NOISE and found.forward.as_run is None
    assert "is what rounding and the runtime's 8-bit products explain" in found.problems[0]


def test_a_changed_graph_is_run_where_its_data_is_looked_for_in_the_working_directory(folder: Path) -> None:
    """As ONNX Runtime 1.20 does for a graph given as bytes; it follows links, which later versions do not."""
    runner = OnnxRunner(folder / "graph", "cpu")
    seen: list[Path] = []

    def session(graph: bytes | str, *_: Any, **__: Any) -> str:
        if isinstance(graph, bytes):
            raise RuntimeError("cannot get file size: No such file or directory [model.onnx.data]")
        data = Path(graph).with_name("model.onnx.data")
        assert data.read_bytes() == (folder / "graph" / data.name).read_bytes() and load_graph(Path(graph))
        seen.append(data)
        return "a session"

    runner._ort = SimpleNamespace(SessionOptions=runner._ort.SessionOptions, InferenceSession=session)
    assert runner._open_exact() == "a session" and not seen[0].parent.exists()


def test_only_products_with_known_codes_are_judged_in_full_precision(folder: Path, tmp_path: Path) -> None:
    graph = folder / "graph" / "model.onnx"
    known = {_scales(node) for node in load_graph(graph).graph if node.op_type == "MatMulNBits"}
    assert _exact_products(graph, known) is False
    assert _exact_products(graph, set(list(known)[1:])) is None  # a product that is no layer of the model
    assert Codes(folder / "graph", "cuda", merged=False).exact() is None
    shutil.copytree(folder / "graph", tmp_path / "graph")
    model = ir.load(tmp_path / "graph" / "model.onnx")
    value = next(node for node in model.graph if node.op_type == "MatMulNBits").inputs[0]
    model.graph.append(ir.node("DynamicQuantizeLinear", [value], num_outputs=3))
    ir.save(model, tmp_path / "graph" / "model.onnx")
    assert _exact_products(tmp_path / "graph" / "model.onnx", known) is None


def test_a_graph_that_answers_nonsense_as_it_runs_has_no_parity() -> None:
    assert judge_as_run(Distance(0.3, 0.9, 1.0, 0.1, 0.7)) is None
    for error in (1.4, float("inf")):
        assert "build the graph with accuracy level 1" in str(judge_as_run(Distance(error, error, 1.0, 0.1, 0.0)))


@pytest.mark.parametrize("hides", ["products of 8 bits", "all products"])
def test_an_adapter_that_rounding_hides_is_looked_for_in_full_precision(
    hides: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.22 gives the very same answers with an adapter that changes little, and without it."""

    class Hiding(OnnxRunner):
        def __init__(self, folder: Path, device: str, exact: bool = False) -> None:
            super().__init__(folder, device, exact)
            self.hides = hides == "all products" or not exact

        def logits(self, tokens: Any) -> Any:
            if self.hides:
                self.active = False
            return super().logits(tokens)

    monkeypatch.setattr("fossil_export.verifying._onnx_models.OnnxRunner", Hiding)
    told = "with the adapter swapped in the graph answers as without it" in verify(folder / "graph").problems
    assert told == (hides == "all products")
