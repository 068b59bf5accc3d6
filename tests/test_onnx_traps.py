"""Graphs and folders made to mislead: each was once exported or passed in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphs import answers, make_case, make_graph, run
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, verify
from fossil_export.verifying._quantized import take_weights
from fossil_export.verifying._shards import check_shards

X = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
MODES = ["merged", "tiled", "fused", "swappable"]


def outputs(result: Any, x: np.ndarray = X) -> list[np.ndarray]:
    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 3
    if result.adapter_file:
        loaded = ort.LoraAdapter()
        loaded.Load(str(result.adapter_file))
        options.add_active_adapter(loaded)
    session = ort.InferenceSession(str(result.graph), settings, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": x}, options)
    return found


def close(found: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - want) < 3e-6 * np.linalg.norm(want))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copies", [True, False])
def test_module_that_is_called_three_times(mode: str, copies: bool, tmp_path: Path) -> None:
    """As the older exporter writes it: `q_proj`, `q_proj_1`, `q_proj_2`, of one initializer or of copies."""
    case = make_case(tmp_path, outputs={"q_proj": 24}, depth=1)
    weight = case.plain.layers[0].q_proj.weight.detach().numpy().T.copy()
    nodes, constants, value = [], [], "x"
    for call in range(3):
        suffix = f"_{call}" if call else ""
        stored = f"onnx::MatMul_{call if copies else 0}"
        if copies or not call:
            constants.append(numpy_helper.from_array(weight, stored))
        nodes.append(helper.make_node("MatMul", [value, stored], [f"v{call}"], f"/layers.0/q_proj{suffix}/MatMul"))
        value = f"v{call}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 24]) for name in ("x", value)]
    model = helper.make_model(
        helper.make_graph(nodes, "calls", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "model.onnx")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=tmp_path / "model.onnx")
    want = X
    for _ in range(3):
        want = answers(case.trained, want)[0]
    assert close(outputs(result)[0], want)


@pytest.mark.parametrize("mode", MODES)
def test_embedding_that_shares_a_cast_with_the_head(mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, outputs={"lm_head": 16}, depth=1)
    file = case.base / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    (case.base / "config.json").write_text('{"tie_word_embeddings": false}')
    stored = load_file(file)["layers.0.lm_head.weight"]
    nodes = [
        helper.make_node("Cast", ["tied"], ["wide"], "/Cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", ["wide", "ids"], ["embedded"], "/Gather"),
        helper.make_node("Transpose", ["wide"], ["turned"], "/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["embedded", "turned"], ["y"], "/layers.0/lm_head/MatMul"),
    ]
    ends = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["s"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", 16]),
    ]
    graph = helper.make_graph(nodes, "tied", ends[:1], ends[1:], [numpy_helper.from_array(stored.numpy(), "tied")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=tmp_path / "model.onnx")
    ids = np.array([3, 1, 15])
    found = run(result.graph, X, result.adapter_file, feeds={"ids": ids})[0]
    shard = next(iter(load_file(case.adapter / "adapter_model.safetensors").values()))
    head = stored.float() + shard.T[:, torch.arange(24) % len(shard)]
    assert np.allclose(found, (stored.float()[ids] @ head.T).numpy(), atol=1e-5)


def test_weight_that_another_product_reads_too(tmp_path: Path) -> None:
    case = make_case(tmp_path, depth=1)
    graph = make_graph(case, tmp_path / "model.onnx", external=False)
    model = onnx.load(graph)
    weight = next(node for node in model.graph.node if node.op_type == "MatMul").input[1]
    more = helper.make_node("FusedMatMul", ["x", weight], ["more"], "elsewhere", domain="com.microsoft", alpha=2.0)
    model.graph.node.append(more)
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["b", "s", None]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, graph)
    for mode in MODES:
        with pytest.raises(FossilExportError, match="also read by elsewhere, which cannot take a shard"):
            export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)


@pytest.mark.parametrize("size", [0.1, 1e-3])
def test_merged_graph_does_not_take_its_adapter_again(size: float, tmp_path: Path) -> None:
    """However small the update is against the weights."""
    case = make_case(tmp_path)
    file = case.adapter / "adapter_model.safetensors"
    save_file({name: value * size for name, value in load_file(file).items()}, file)
    plain = make_graph(case, tmp_path / "plain" / "model.onnx", dtype="float16")
    merged = export_onnx(case.adapter, tmp_path / "merged", base=case.base, mode="merged", onnx=plain)
    for mark in (True, False):
        if not mark:
            model = onnx.load(merged.graph)
            del model.metadata_props[:]
            onnx.save(model, merged.graph)
        with pytest.raises(FossilExportError, match=r"carries an adapter already|made from another model"):
            export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=merged.graph)


def test_damaged_codes_are_seen(tmp_path: Path) -> None:
    case = make_case(tmp_path, inputs=32, outputs={"q_proj": 64}, depth=1)
    make_graph(case, tmp_path / "model.onnx", "nbits", external=False)
    assert take_weights(case.plain, tmp_path, check=False) == []
    model = onnx.load(tmp_path / "model.onnx")
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_Q4"))
    values = numpy_helper.to_array(codes).copy()
    keep = np.unique(np.linspace(0, 63, 16).astype(int))  # the rows that placing it looks at
    values[~np.isin(np.arange(64), keep)] = 0
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    onnx.save(model, tmp_path / "model.onnx")
    fresh = make_case(tmp_path, inputs=32, outputs={"q_proj": 64}, depth=1)
    (problem,) = take_weights(fresh.plain, tmp_path, check=False)
    assert "layers.0.q_proj: its codes in the graph are" in problem


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["fused", "swappable"])
def test_shard_behind_a_bias_is_looked_at(mode: str, first: bool, tmp_path: Path) -> None:
    case = make_case(tmp_path, bias=True)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "nbits", external=False)
    model = onnx.load(graph)
    for node in model.graph.node:
        if node.op_type == "Add" and first:
            node.input[0], node.input[1] = node.input[1], node.input[0]
    onnx.save(model, graph)
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    assert check_shards(result.output, load_adapter(case.adapter)) == []
    other = make_case(tmp_path, bias=True, seed=5, adapter="other")
    found = check_shards(result.output, load_adapter(other.adapter))
    assert len(found) == 6 and "its shard in the graph has" in found[0]


def test_weights_level_says_when_it_compares_nothing(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    for mode in ("merged", "tiled", "fused"):
        result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, onnx=graph)
        with pytest.raises(FossilExportError, match="checked by running it, with --level forward"):
            verify(result.output, level="weights")


def test_tokenizer_of_the_adapter_comes_as_a_whole(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (graph.parent / name).write_text('{"of": "graph"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (case.adapter / name).write_text('{"of": "adapter"}')
    out = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph).output
    assert {json.loads((out / name).read_text())["of"] for name in ("tokenizer.json", "tokenizer_config.json")} == {
        "adapter"
    }
    assert not (out / "chat_template.jinja").exists()


class TestOverwriting:
    """--overwrite replaces what an earlier conversion wrote, and nothing that is read or that is another's."""

    def test_files(self, tmp_path: Path) -> None:
        case = make_case(tmp_path)
        graph = make_graph(case, tmp_path / "plain" / "model.onnx")
        swap = export_onnx(case.adapter, tmp_path / "swap", base=case.base, mode="swappable", onnx=graph).output
        options: dict[str, Any] = {"to": "onnx-adapter", "base": case.base, "graph": swap, "overwrite": True}
        (tmp_path / "notes.txt").write_text("do not lose this")
        for path, match in (
            (swap / "model.onnx", "is no file of this format"),
            (tmp_path / "notes.txt", "is no file of this format"),
            (case.adapter / "adapter_model.safetensors", "which is only read"),
            (case.base / "model.safetensors", "is no file of this format"),
        ):
            before = path.read_bytes()
            with pytest.raises(FossilExportError, match=match):
                convert(case.adapter, path, **options)
            assert path.read_bytes() == before
        made = convert(case.adapter, tmp_path / "new.onnx_adapter", **options).output
        assert convert(case.adapter, made, **options).nbytes > 0

    def test_base_is_only_read(self, tmp_path: Path) -> None:
        case = make_case(tmp_path)
        (case.base / "fossil_export.json").write_text("{}")
        with pytest.raises(FossilExportError, match="which is only read"):
            convert(case.adapter, case.base, to="lora", base=case.base, overwrite=True)
        assert (case.base / "model.safetensors").is_file()


def test_lora_that_is_another_model(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    whole = convert(case.adapter, tmp_path / "lora", to="lora", base=case.base).output

    def problems(change: Any) -> tuple[str, ...]:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        state = load_file(folder / "adapter_model.safetensors")
        change(config, state)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(state, folder / "adapter_model.safetensors")
        return verify(folder, level="weights").problems

    name = "base_model.model.layers.0.q_proj.lora_A.weight"
    assert problems(lambda config, state: None) == ()
    assert (
        "its update would be scaled, that of layers.0.q_proj"
        in problems(lambda config, state: config.update(alpha_pattern={"q_proj": 400}))[0]
    )
    assert "does not cover" in problems(lambda config, state: config.update(target_modules=["q_proj"]))[0]
    assert "do not fit" in problems(lambda config, state: state.update({name: state[name][:, :20].clone()}))[0]
    more = {"base_model.model.layers.0.extra.lora_A.weight": torch.ones(4, 24)}
    assert "which the adapter does not" in problems(lambda config, state: state.update(more))[0]


def test_state_dict_with_a_module_twice(tmp_path: Path) -> None:
    torch.save({"a.key.bone": torch.ones(4, 8), "a.key.disha": torch.ones(4, 8)}, tmp_path / "both.pth")
    with pytest.raises(FossilExportError, match=r"holds a\.key twice"):
        load_adapter(tmp_path / "both.pth")


def test_config_that_does_not_tell_all_sizes(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 24}))
    with pytest.raises(FossilExportError, match="is of type 'qwen3_moe'"):
        convert(case.adapter, tmp_path / "lora", to="lora", base_config=tmp_path / "config.json")


@pytest.mark.parametrize("mode", ["merged", "tiled"])
def test_doubles_are_not_rounded_in_silence(mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, depth=1)
    graph = make_graph(case, tmp_path / "model.onnx", external=False)
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(model, graph)
    with pytest.raises(FossilExportError, match="stored as DOUBLE"):
        export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
