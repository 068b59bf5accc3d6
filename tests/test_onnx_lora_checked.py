"""LoRA adapters in graphs: a wrong value is named, and what a graph has no place for is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import make_case, make_graph
from onnx import numpy_helper
from onnx_lora_tools import PATTERNS, lora_case, problems
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, export_onnx
from fossil_export.onnx._adapter_file import write_adapter
from fossil_export.onnx._signature import read_signature
from fossil_export.verifying._shards import _parameters


def test_a_graph_for_shards_refuses_lora_and_says_what_to_do(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    lora = lora_case(tmp_path)
    line = r"is a lora adapter, .* has one input for each, for FOSSIL's shards; export a swappable graph with this"
    with pytest.raises(FossilExportError, match=line):
        convert(lora.adapter, tmp_path / "no", to="onnx-adapter", base=case.base, graph=result.output)
    assert not (tmp_path / "no").exists()


def test_what_the_graph_has_no_place_for_is_refused(tmp_path: Path) -> None:
    case = lora_case(tmp_path, target_modules=["q_proj"])
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    (tmp_path / "wide").mkdir()
    wide = lora_case(tmp_path / "wide", inputs=40, target_modules=["q_proj"])
    for other, base, line in (
        (lora_case(tmp_path, "more").adapter, case.base, r"has no inputs for layers.0.k_proj"),
        (wide.adapter, wide.base, r"does not fit the graph's layer \[16, 24\]: it is made for 40 inputs"),
    ):
        with pytest.raises(FossilExportError, match=line):
            convert(other, tmp_path / "no", to="onnx-adapter", base=base, graph=result.output)
    file = case.base / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(FossilExportError, match="whose weights are not those of"):
        convert(case.adapter, tmp_path / "no", to="onnx-adapter", base=case.base, graph=result.output)


def test_a_wrong_value_of_a_fused_graph_is_named(tmp_path: Path) -> None:
    case = lora_case(tmp_path, **PATTERNS)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph, copy_data=True)
    whole = onnx.load(result.graph)

    def changed(name: str, row: int, column: int) -> list[str]:
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        tensor = next(one for one in model.graph.initializer if one.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[row, column] = np.nextafter(values[row, column], np.float32(9))
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(model, result.graph)
        return problems(result, case.adapter)

    prefix = "layers.1.qkv_proj.lora_"
    # Ranks 3, 4 and 7, columns from 0, 16 and 24.
    assert "layers.1.k_proj: its lora_A in the graph has" in changed(f"{prefix}A", 11, 3 + 1)[0]
    assert "layers.1.v_proj: its lora_B in the graph has" in changed(f"{prefix}B", 3 + 4 + 2, 24 + 5)[0]
    assert changed(f"{prefix}B", 0, 24) == [f"{prefix}B: has values for modules that were not trained"]
    model = onnx.ModelProto()
    model.CopyFrom(whole)
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    gemms[0].input[0], gemms[1].input[0] = gemms[1].input[0], gemms[0].input[0]
    onnx.save(model, result.graph)
    assert [line.partition(":")[2] for line in problems(result, case.adapter)] == [
        f" is not multiplied by what layers.{n}.qkv_proj.lora_A gives" for n in (0, 1)
    ]


def test_a_wrong_value_of_an_adapter_file_is_named(tmp_path: Path) -> None:
    case = lora_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    signature, right = read_signature(result.graph), dict(_parameters(result.adapter_file))
    a, b = "layers.1.k_proj.lora_A", "layers.1.k_proj.lora_B"

    def written(values: dict[str, np.ndarray]) -> list[str]:
        write_adapter(result.adapter_file, values, signature)
        return problems(result, case.adapter)

    assert written(right) == []
    turned = {name: value.copy() for name, value in right.items()}
    turned[a][5, 2] *= -1
    assert "k_proj: its lora_A in the graph has" in written(turned)[0]
    assert written({name: value for name, value in right.items() if name != a}) == [
        "layers.1.k_proj has no shard in adapter.onnx_adapter"
    ]
    longer = {a: np.pad(right[a], ((0, 0), (0, 1))), b: np.pad(right[b], ((0, 1), (0, 0)))}
    assert written(right | longer) == [f"{b}: is [5, 8], and {a} [24, 5]; the trained ones have rank 4"]


def test_a_bias_of_lora_is_no_branch(tmp_path: Path) -> None:
    case = lora_case(tmp_path, lora_bias=True)
    graph = make_graph(case, tmp_path / "model.onnx")
    for mode in ("tiled", "fused", "swappable"):
        with pytest.raises(FossilExportError, match=r"q_proj\.bias.*\(lora_bias\) is no .*; use --mode merged"):
            export_onnx(case.adapter, tmp_path / "no", base=case.base, mode=mode, onnx=graph)
    with pytest.raises(FossilExportError, match=r"more than weights of linear layers \(layers.0.k_proj.bias"):
        export_onnx(case.adapter, tmp_path / "no", base=case.base, onnx=graph)
