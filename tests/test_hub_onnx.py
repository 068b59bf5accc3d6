"""Graphs and adapter files for them, by ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from graphs import answers, make_case, make_graph, run
from loopback import LoopbackHub

from fossil_export import convert, export_onnx


def test_a_graph_and_another_adapter_for_it(hub: LoopbackHub, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "model.onnx")
    for name in ("base", "adapter"):
        hub.add_folder(f"ada/{name}", tmp_path / name)
    here = export_onnx(case.adapter, tmp_path / "here", base=case.base, mode="swappable", onnx=graph)
    file = convert("ada/adapter", tmp_path / "one.onnx_adapter", to="onnx-adapter", base="ada/base", graph=here.output)
    assert not list((tmp_path / "home").rglob("model.safetensors"))  # a few rows tell whether it is the graph's base

    there = export_onnx("ada/adapter", tmp_path / "there", base="ada/base", mode="swappable", onnx=graph)
    x = np.random.default_rng(0).standard_normal((1, 3, 24)).astype(np.float32)
    want = answers(case.trained, x)
    for found in (run(there.graph, x, there.adapter_file), run(here.graph, x, file.output)):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
