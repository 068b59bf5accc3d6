"""What stops an ONNX export: one clear line, and no file or folder left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx_tools
import pytest
import torch
from click.testing import CliRunner
from graphs import Case, make_case, make_graph
from onnx_tools import refused
from safetensors.torch import load_file, save_file

from fossil_export import export_onnx
from fossil_export.cli import main

case = onnx_tools.case
graph = onnx_tools.graph


@pytest.mark.parametrize("mode", ["fused", "swappable"])
def test_bat_is_no_branch(mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, variant="bat")
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    refused(
        "bat adapter.*use --mode tiled or merged, or approximate it by a LoRA", case, tmp_path, mode=mode, onnx=graph
    )


def test_graph_of_another_model(case: Case, graph: Path, tmp_path: Path) -> None:
    other = {name: value + 0.05 for name, value in load_file(case.base / "model.safetensors").items()}
    save_file(other, case.base / "model.safetensors")
    refused("holds other weights than the base: the graph was made from another model", case, tmp_path, onnx=graph)


def test_graph_of_another_model_without_names(case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", names=False)
    other = {name: value + 0.05 for name, value in load_file(case.base / "model.safetensors").items()}
    save_file(other, case.base / "model.safetensors")
    refused("has no place for layers.0.k_proj.*no product in it", case, tmp_path, onnx=graph)


def test_module_that_could_be_two(case: Case, tmp_path: Path) -> None:
    layers = case.plain.layers
    layers[1].k_proj.weight.data = layers[0].k_proj.weight.data.clone()
    save_file({name: value.clone() for name, value in case.plain.state_dict().items()}, case.base / "model.safetensors")
    nameless = make_graph(case, tmp_path / "plain" / "model.onnx", names=False)
    refused("layers.0.k_proj could be n1 .*, n5 .*equal weights", case, tmp_path, onnx=nameless)
    named = make_graph(case, tmp_path / "named" / "model.onnx")
    assert export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=named).targets == 6


@pytest.mark.parametrize("mode", ["tiled", "fused", "swappable"])
def test_graph_that_carries_an_adapter(case: Case, graph: Path, mode: str, tmp_path: Path) -> None:
    once = export_onnx(case.adapter, tmp_path / "once", base=case.base, mode=mode, onnx=graph)
    match = "carries an adapter already" + (".*convert --to onnx-adapter" if mode == "swappable" else "")
    refused(match, case, tmp_path, mode="fused", onnx=once.graph)


@pytest.mark.parametrize(("mode", "opset"), [("tiled", 12), ("fused", 11), ("swappable", 14)])
def test_old_opset(case: Case, mode: str, opset: int, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", opset=opset)
    refused(f"has opset {opset}, --mode {mode} needs 1[35]; raise it with", case, tmp_path, mode=mode, onnx=graph)


def test_no_graph(case: Case, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no graph, it is a sentence")
    refused("is no ONNX graph", case, tmp_path, onnx=tmp_path / "text.onnx")
    refused("no such file or folder", case, tmp_path, onnx=tmp_path / "nowhere.onnx")
    (tmp_path / "empty").mkdir()
    refused("holds no model.onnx", case, tmp_path, onnx=tmp_path / "empty")
    refused("has no config.json, from which a graph is made", case, tmp_path)


@pytest.mark.parametrize("mode", ["merged", "tiled"])
def test_quantized_weights_cannot_be_added_to(case: Case, mode: str, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "nbits")
    refused("are quantized, and shards cannot be added to codes", case, tmp_path, mode=mode, onnx=graph)


def test_options_that_contradict(case: Case, graph: Path, tmp_path: Path) -> None:
    refused("leave --runtime and --precision out", case, tmp_path, onnx=graph, precision="fp16")
    refused("int4 weights are codes", case, tmp_path, mode="tiled", precision="int4")
    refused("mode is 'melted', expected merged, tiled", case, tmp_path, mode="melted")
    refused("precision is 'fp8', expected", case, tmp_path, precision="fp8")
    refused("device is 'mps', expected cpu, cuda", case, tmp_path, device="mps")


def test_diverged_shards(case: Case, graph: Path, tmp_path: Path) -> None:
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    refused("infinite or NaN", case, tmp_path, mode="fused", onnx=graph)


def test_shard_too_large_for_float16(case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", dtype="float16")
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = 1e6
    save_file(tensors, file)
    for mode in ("merged", "fused"):
        refused("does not fit FLOAT16; use a wider --precision", case, tmp_path, mode=mode, onnx=graph)


@pytest.mark.parametrize(("package", "extra"), [("onnx_ir", "onnx"), ("onnx", "onnx")])
def test_missing_extra(
    case: Case, graph: Path, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(rf"needs {package.replace('_', '-')}: .*pip install 'fossil-export\[{extra}\]'", case, tmp_path, onnx=graph)


def test_trained_modules_the_graph_does_not_have(case: Case, graph: Path, tmp_path: Path) -> None:
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.q_proj.weight"] = torch.ones(16, 24)
    for key in [key for key in tensors if "layers.0.q_proj.miss" in key]:
        del tensors[key]
    save_file(tensors, file)
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["layers.0.q_proj"]
    (case.adapter / "adapter_config.json").write_text(json.dumps(config))
    refused("also trained layers.0.q_proj.weight whole, and the graph has the base's", case, tmp_path, onnx=graph)


def test_command_line_is_one_line(case: Case, graph: Path, tmp_path: Path) -> None:
    command = ["onnx", str(case.adapter), "--base", str(case.base), "--onnx", str(graph), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, "--mode", "swappable", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["targets"] == 6
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "exists already" in again.stderr and again.stderr.count("\n") == 1
    assert CliRunner().invoke(main, [*command, "--mode", "fused", "--overwrite"]).exit_code == 0
