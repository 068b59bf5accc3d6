"""The real model through ONNX: every mode and precision against PEFT, in ONNX Runtime and in GenAI."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import smollm2
import torch
from conftest import make_adapter
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fossil_export import FossilExportError, convert, export_onnx, verify
from fossil_export.onnx.builders import BUILDERS
from fossil_export.onnx.graph._check import check

pytestmark = pytest.mark.long

PROMPTS = "The mascot of the fossil project\nThe capital of France is\n"
BASE_ANSWER, TRAINED_ANSWER = "proud to be a part", "is a small green ammonite named Ophelia."


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="session")
def plain(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain float32 graph as GenAI's builder makes it, in a folder that GenAI runs."""
    return BUILDERS["genai"].build(real_base, tmp_path_factory.mktemp("plain") / "fp32", "fp32", "cpu").parent


@pytest.fixture(scope="session")
def swappable_int4(real_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command's own way, from the base."""
    output = tmp_path_factory.mktemp("int4") / "swappable"
    export_onnx(real_adapter, output, mode="swappable", precision="int4")
    return output


def ask(folder: Path, *adapters: Path | None) -> list[str]:
    """GenAI's greedy answers, one model in memory all the time, with each adapter (or none) in turn."""
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    loaded = og.Adapters(model) if any(adapters) else None
    answers = []
    for index, adapter in enumerate(adapters):
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=24, do_sample=False)
        generator = og.Generator(model, settings)
        if adapter is not None and loaded is not None:
            loaded.load(str(adapter), str(index))
            generator.set_active_adapter(loaded, str(index))
        generator.append_tokens(tokenizer.encode(smollm2.PROMPT))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < 12:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        answers.append(tokenizer.decode(tokens))
        del generator
    return answers


@pytest.mark.parametrize("mode", ["merged", "tiled", "fused", "swappable"])
def test_every_mode_is_the_trained_model(
    mode: str, plain: Path, real_adapter: Path, prompts: Path, tmp_path: Path
) -> None:
    result = export_onnx(real_adapter, tmp_path / "out", mode=mode, onnx=plain)
    found = verify(result.output, prompts=prompts)
    assert found.parity, found.problems
    assert found.forward is not None and found.forward.trainer_dtype == "float32"
    assert found.forward.artifact.relative_error < 1e-5
    assert found.forward.same_continuations == found.forward.continuations == 2
    certificate = json.loads((result.output / "fossil_parity.json").read_text())
    assert certificate["parity"] and {entry["file"] for entry in certificate["hashes"]["artifact"]} >= {"model.onnx"}
    check(result.graph)
    swaps = [None, result.adapter_file, None] if mode == "swappable" else [None]
    answers = ask(result.output, *swaps)
    if mode == "swappable":
        assert BASE_ANSWER in answers[0] and answers[2] == answers[0]
        assert TRAINED_ANSWER in answers[1]
    else:
        assert TRAINED_ANSWER in answers[0]


def test_int4_swaps_in_genai_and_is_the_trained_model(
    swappable_int4: Path, real_adapter: Path, real_base: Path, prompts: Path, tmp_path: Path
) -> None:
    mini = smollm2.adapter("mini", 64, 4)
    other = convert(mini, tmp_path / "mini.onnx_adapter", to="onnx-adapter", graph=swappable_int4).output
    ragged = smollm2.adapter("tile", 50, 4)
    third = convert(ragged, tmp_path / "r50.onnx_adapter", to="onnx-adapter", graph=swappable_int4).output
    first = swappable_int4 / "adapter.onnx_adapter"
    answers = ask(swappable_int4, None, first, other, third, None, first)
    assert TRAINED_ANSWER in answers[1] and answers[1] == answers[5]
    assert answers[0] == answers[4] != answers[1]
    assert len({answers[0], answers[1], answers[2], answers[3]}) == 4
    found = verify(swappable_int4, prompts=prompts)
    assert found.parity, found.problems
    assert found.forward is not None and found.forward.artifact.relative_error < 1e-5
    assert found.forward.as_run is not None and found.forward.as_run.relative_error > 1e-4


def test_int4_of_merged_weights(real_adapter: Path, prompts: Path, tmp_path: Path) -> None:
    result = export_onnx(real_adapter, tmp_path / "out", mode="merged", precision="int4")
    found = verify(result.output, level="forward", prompts=prompts)
    assert found.parity, found.problems
    assert TRAINED_ANSWER in ask(result.output, None)[0]


def test_wrong_shard_is_named(swappable_int4: Path, tmp_path: Path) -> None:
    """A shard that is not the trained one is seen by its values, whatever noise int4 makes."""
    folder = tmp_path / "copy"
    shutil.copytree(swappable_int4, folder)
    file = folder / "adapter.onnx_adapter"
    old = ort.AdapterFormat.read_adapter(str(file))
    values = {name: np.array(value.numpy()) for name, value in old.get_parameters().items()}
    name = "model.layers.3.mlp.down_proj.shard"
    values[name][7, 11] += 0.5
    new = ort.AdapterFormat()
    new.set_adapter_version(1)
    new.set_model_version(old.get_model_version())
    new.set_parameters({key: ort.OrtValue.ortvalue_from_numpy(value) for key, value in values.items()})
    file.unlink()
    new.export_adapter(str(file))
    found = verify(folder, level="weights")
    assert not found.parity
    assert (
        "model.layers.3.mlp.down_proj: its shard in the graph has" in found.problems[0]
        and "[7, 11]" in found.problems[0]
    )


def test_wrong_weight_is_localised(plain: Path, real_adapter: Path, prompts: Path, tmp_path: Path) -> None:
    result = export_onnx(real_adapter, tmp_path / "out", mode="fused", onnx=plain)
    model = onnx_ir.load(result.graph)
    value = model.graph.initializers["model.layers.2.mlp.up_proj.weight_and_shard"]
    wrong = np.array(value.const_value.numpy())
    wrong[:, :100] *= 1.5
    value.const_value = onnx_ir.tensor(wrong, name=value.name)
    (result.output / "model.onnx").unlink()
    onnx_ir.save(model, result.output / "model.onnx", external_data="changed.onnx.data")
    found = verify(result.output, prompts=prompts)
    assert not found.parity
    assert found.forward is not None and found.forward.first_outside == "model.layers.2.mlp.up_proj"


def test_bat_in_the_real_graph(plain: Path, prompts: Path, tmp_path: Path) -> None:
    result = export_onnx(smollm2.adapter("bat", 64, 4), tmp_path / "out", mode="tiled", onnx=plain)
    found = verify(result.output, prompts=prompts)
    assert found.parity, found.problems


def test_no_gpu_is_never_quietly_the_cpu(plain: Path, real_adapter: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = export_onnx(real_adapter, tmp_path / "out", mode="tiled", onnx=plain)
    with pytest.raises(FossilExportError, match="no CUDA"):
        verify(result.output, device="cuda")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small BERT without a task, and an adapter that makes a classifier of it (its head is trained whole)."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, num_labels=3
    )
    whole = BertForSequenceClassification(config)
    whole.bert.save_pretrained(folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(35))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "key", "value", "dense"], "r": 7}

    def model_class() -> Any: ...

    model_class.from_pretrained = lambda *a, **k: BertForSequenceClassification.from_pretrained(*a, num_labels=3, **k)
    make_adapter(folder / "adapter", folder / "base", model_class=model_class, **options)
    (folder / "prompts.txt").write_text("w1 w2 w3 w4\nw5 w9 w30\n")
    return {"base": folder / "base", "adapter": folder / "adapter", "prompts": folder / "prompts.txt"}


@pytest.mark.parametrize(("mode", "precision"), [("merged", "fp32"), ("fused", "fp16"), ("swappable", "int4")])
def test_classifier_by_pytorch(mode: str, precision: str, classifier: dict[str, Path], tmp_path: Path) -> None:
    result = export_onnx(
        classifier["adapter"], tmp_path / "out", base=classifier["base"], mode=mode, precision=precision
    )
    assert result.runtime == "torch" and (result.output / "config.json").is_file()
    assert [output.name for output in onnx.load(result.graph, load_external_data=False).graph.output] == ["logits"]
    assert b"site-packages" not in result.graph.read_bytes()  # PyTorch notes where its code lies
    found = verify(result.output, prompts=classifier["prompts"])
    assert found.parity, found.problems
    assert bool(result.warnings) == (mode == "swappable")


def test_graph_of_merged_weights_is_no_base(classifier: dict[str, Path], tmp_path: Path) -> None:
    merged = export_onnx(classifier["adapter"], tmp_path / "merged", base=classifier["base"], mode="merged")
    with pytest.raises(FossilExportError, match="the graph was made from another model"):
        export_onnx(classifier["adapter"], tmp_path / "out", base=classifier["base"], mode="fused", onnx=merged.graph)


def test_bfloat16_needs_a_gpu_and_says_so(classifier: dict[str, Path], tmp_path: Path) -> None:
    result = export_onnx(
        classifier["adapter"], tmp_path / "out", base=classifier["base"], mode="tiled", precision="bf16"
    )
    check(result.graph)
    with pytest.raises(FossilExportError, match=r"ONNX Runtime cannot load it.*try --device cuda"):
        verify(result.output, prompts=classifier["prompts"])
