"""Graphs that name files or libraries outside their folder."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from graphs import make_case, make_graph

from fossil_export import FossilExportError, export_onnx, verify


@pytest.mark.parametrize("mode", ["tiled", "swappable"])
def test_data_outside_the_folder(mode: str, tmp_path: Path) -> None:
    """What a graph calls its data is the name of a file that is written beside the new graph."""
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{entry.value}"
    graph.write_bytes(model.SerializeToString())
    data = graph.with_name("model.onnx.data").rename(tmp_path / "model.onnx.data")
    before = data.read_bytes()
    with pytest.raises(FossilExportError, match=r"keeps its data outside its folder, in .*; move it beside the graph"):
        export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {"custom_ops_library": "ops"},
        {"provider_options": [{"qnn": {"backend_path": "mine"}}]},
        {"provider_options": [{"NvTensorRtRtx": {"trt_extra_plugin_lib_paths": "mine"}}]},
        {"config_entries": {"anything": "./libmine.so.1"}},
    ],
)
def test_libraries_in_a_config_of_genai(options: dict[str, object], tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    config = {"model": {"decoder": {"session_options": options}, "type": "llama"}, "search": {"max_length": 8}}
    (graph.parent / "genai_config.json").write_text(json.dumps(config))
    match = r"genai_config\.json: .* is .*, a library that GenAI would load and run; take it out"
    with pytest.raises(FossilExportError, match=match):
        export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph)
    with pytest.raises(FossilExportError, match=match):
        verify(graph.parent, base=case.base, adapter=case.adapter)
    config["model"]["decoder"] = {"session_options": {"log_id": "x", "provider_options": [{"cuda": {"a": "1"}}]}}
    (graph.parent / "genai_config.json").write_text(json.dumps(config))
    assert export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph).targets == 6
    (graph.parent / "genai_config.json").write_text('{"model": "decoder"}')
    with pytest.raises(FossilExportError, match=r"genai_config\.json: model is 'decoder', not a JSON object"):
        export_onnx(case.adapter, tmp_path / "more", base=case.base, mode="swappable", onnx=graph)
