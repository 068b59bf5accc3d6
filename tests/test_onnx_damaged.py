"""Graphs that are damaged, linked elsewhere or changed, bases that change: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_tools
import pytest
from graphs import Case, make_graph
from onnx_tools import refused

from fossil_export import FossilExportError, Progress, convert, export_onnx

case = onnx_tools.case
graph = onnx_tools.graph


def test_external_data_missing_or_cut(case: Case, graph: Path, tmp_path: Path) -> None:
    data = graph.with_name("model.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    refused("has 100 bytes, the graph reads up to", case, tmp_path, onnx=graph)
    data.unlink()
    refused("external data model.onnx.data is missing", case, tmp_path, onnx=graph)


def damage(graph: Path, change: Callable[[Any], Any]) -> None:
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializePartialToString())


def _long_dims(model: Any) -> None:
    model.graph.initializer[0].dims.extend([16, 2] * 40)


def _other_length(model: Any) -> None:
    next(one for one in model.graph.initializer[0].external_data if one.key == "length").value = "16"


def _cycle(model: Any) -> None:
    del model.graph.node[0].input[:]
    model.graph.node[0].input.extend([model.graph.node[-1].output[0], "layers.0.q_proj.weight"])
    model.graph.node[-1].input[0] = model.graph.node[0].output[0]


def _bytes_in(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def _long_name(model: Any) -> None:
    next(one for one in model.graph.initializer[0].external_data if one.key == "location").value = "x" * 100_000


def _no_type(model: Any) -> None:
    model.graph.initializer[0].data_type = 0


def _data_in_an_attribute(model: Any) -> None:
    node = model.graph.node.add(op_type="Constant", output=["c"])
    tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.CopyFrom(model.graph.initializer[0])
    next(one for one in tensor.external_data if one.key == "location").value = "../secret"


def _no_output(model: Any) -> None:
    node = next(one for one in model.graph.node if "layers.0.q_proj.weight" in one.input)
    del node.output[:]
    model.graph.input[0].type.Clear()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_no_output, "layers.0.q_proj"),
        (_long_dims, "the constant layers.0.q_proj.weight .*; export the graph again"),
        (_other_length, "names 16 bytes from byte 0 on"),
        (_cycle, "nodes that wait for each other"),
        (_bytes_in, "layers.0.q_proj is multiplied by UINT8"),
        (_long_name, "external data x{300} is missing or no file"),
        (_no_type, "has no type"),
        (_data_in_an_attribute, "keeps its data outside its folder"),
    ],
)
def test_graphs_that_do_not_hold_what_they_say(
    change: Callable[[Any], Any], match: str, case: Case, graph: Path, tmp_path: Path
) -> None:
    damage(graph, change)
    refused(match, case, tmp_path, onnx=graph)


@pytest.mark.parametrize("change", ["block_size", "codes", "text"])
def test_quantized_products_whose_numbers_disagree_have_no_weight(change: str, case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form="nbits", external=False)

    def disagree(model: Any) -> None:
        node = model.graph.node[0]
        block = next(one for one in node.attribute if one.name == "block_size")
        if change == "block_size":
            block.i = 17
        elif change == "text":
            block.type, block.s = onnx.AttributeProto.STRING, b"16"
        else:
            shape = model.graph.initializer[0].dims
            shape[0], shape[1] = shape[0] // 2, shape[1]
            model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[: shape[0] * shape[1] * shape[2]]

    damage(graph, disagree)
    refused("has no place for layers.0.q_proj", case, tmp_path, onnx=graph, mode="fused")


def test_nothing_is_said_beside_the_error(
    case: Case, graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by NumPy of values that are not finite, nor by onnx_ir's log, which pytest's handlers would catch."""
    monkeypatch.setattr(logging.root, "handlers", [])
    data = graph.with_name("model.onnx.data")
    whole = data.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.write_bytes(b"\xff" * len(whole))
        refused("holds other weights than the base", case, tmp_path, onnx=graph, mode="fused")
    data.write_bytes(whole)
    damage(graph, lambda model: model.graph.node[3].ClearField("attribute"))
    refused("checker", case, tmp_path, onnx=graph, mode="fused")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["at", "outputs", "dtype", "kind", "name"])
def test_signatures_that_changed_are_seen(name: str, case: Case, graph: Path, tmp_path: Path) -> None:
    """Also where no sum tells: those written before there was one."""
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    written = next(one.value for one in onnx.load(result.graph, load_external_data=False).metadata_props)
    for old in (False, True):
        record = json.loads(written)
        slot = record["signature"]["slots"][0]
        place = slot["pieces"][0] if name == "at" else slot
        place[name] = 8 if name in ("outputs", "at") else {"a": 1}
        if old:
            del record["sha256"]
        damage(result.graph, lambda model: setattr(model.metadata_props[0], "value", json.dumps(record)))  # noqa: B023
        with pytest.raises(FossilExportError, match=r"metadata is damaged|has no input .* metadata tells") as caught:
            convert(case.adapter, tmp_path / "a", to="onnx-adapter", graph=result.graph, base=case.base)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.onnx.data"])
def test_links_out_of_the_graphs_folder(name: str, case: Case, graph: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    if (graph.parent / name).exists():
        (graph.parent / name).rename(elsewhere)
    else:
        elsewhere.write_text("a secret of this machine")
    (graph.parent / name).symlink_to(elsewhere)
    refused(f"{name}: is a link to", case, tmp_path, onnx=graph, mode="tiled")


def test_a_base_that_changes_while_the_graph_is_made(case: Case, graph: Path, tmp_path: Path) -> None:
    def change(now: Progress) -> None:
        if now.step == "checking the graph":
            content = bytearray((case.base / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (tmp_path / "incoming").write_bytes(content)
            (tmp_path / "incoming").replace(case.base / "model.safetensors")

    refused("changed while it was being read", case, tmp_path, onnx=graph, mode="swappable", progress=change)
