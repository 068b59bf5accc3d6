"""Graphs in bfloat16, which only GPUs run: by ONNX's reference, and without nodes that ONNX Runtime lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from gpu.graphs import plain_graph
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from fossil_export import export_onnx, load_adapter


def export(mode: str, rank: int, folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The graph, and the weight and the shard that it was made of."""
    torch.manual_seed(rank)
    weight, shard = torch.randn(6, 20).bfloat16(), torch.randn(rank, 6)
    for name in ("base", "adapter", "plain"):
        (folder / name).mkdir()
    save_file({"layer.weight": weight}, folder / "base" / "model.safetensors")
    save_file({"base_model.model.layer.miss_block": shard}, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "MISS", "r": rank, "target_modules": ["layer"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    onnx.save(plain_graph(weight, "bfloat16"), folder / "plain" / "model.onnx")
    graph = export_onnx(
        load_adapter(folder / "adapter"),
        folder / "out",
        base=folder / "base",
        mode=mode,
        onnx=folder / "plain" / "model.onnx",
    ).graph
    return graph, weight, shard


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    within = [one.g for node in graph.node for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for inner in within for node in nodes(inner))]


@pytest.mark.parametrize("rank", [4, 6])
def test_fused_graphs_are_the_model_and_pad_no_bfloat16(rank: int, tmp_path: Path) -> None:
    graph, weight, shard = export("fused", rank, tmp_path)
    x = torch.randn(3, 20).bfloat16()
    [found] = ReferenceEvaluator(onnx.load(graph)).run(None, {"x": x.float().numpy()})
    merged = weight.double() + shard.double()[torch.arange(20) % rank].T
    want = (x.double() @ merged.T).numpy()
    assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)
    assert any(node.op_type == "Pad" for node in nodes(onnx.load(graph).graph)) == (rank == 6)
    assert padded(graph) <= {"Cast"}


def test_swappable_graphs_pad_no_bfloat16(tmp_path: Path) -> None:
    graph, _, _ = export("swappable", 4, tmp_path)
    assert padded(graph) == {"Cast"}


def padded(path: Path) -> set[str]:
    """What makes the values that are padded: in a graph of bfloat16 it must widen them."""
    found = nodes(onnx.load(path).graph)
    made = {name: node for node in found for name in node.output}
    widening = [made[node.input[0]] for node in found if node.op_type == "Pad"]
    assert all(node.attribute[0].i == onnx.TensorProto.FLOAT for node in widening if node.op_type == "Cast")
    return {node.op_type for node in widening}
