"""LoRA adapters in graphs: every mode against PEFT's unmerged model, and swapped."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import answers, error, make_case, make_graph, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_lora_tools import MODES, OUTPUTS, PATTERNS, X, lora_case, problems
from safetensors.torch import load_file, save_file

from fossil_export import convert, export_onnx, load_adapter
from fossil_export.onnx.graph._check import check
from fossil_export.verifying._shards import _parameters


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    inputs=st.integers(3, 40),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 50),
    form=st.sampled_from(["matmul", "transpose", "packed", "gemm", "gemm_transb"]),
    mode=st.sampled_from(MODES),
    names=st.booleans(),
    targets=st.sampled_from([["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["layers.1.k_proj"]]),
    config=st.sampled_from([{}, {"lora_alpha": 13}, {k: v for k, v in PATTERNS.items() if k != "rank_pattern"}]),
)
def test_graphs_answer_as_peft_does(
    inputs: int,
    widths: tuple[int, int, int],
    rank: int,
    form: str,
    mode: str,
    names: bool,
    targets: list[str],
    config: dict[str, Any],
) -> None:
    """Any rank, more than the layer's inputs too."""
    flat = form.startswith("gemm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        outputs = dict(zip(OUTPUTS, widths, strict=True))
        case = lora_case(folder, inputs=inputs, outputs=outputs, r=rank, target_modules=targets, **config)
        graph = make_graph(case, folder / "plain" / "model.onnx", form, names=names, flat=flat)
        result = export_onnx(case.adapter, folder / "out", base=case.base, mode=mode, onnx=graph)
        x = np.random.default_rng(rank).standard_normal((*((5,) if flat else (2, 3)), inputs)).astype(np.float32)
        assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < 2e-6
        if mode == "swappable":
            assert np.array_equal(run(result.graph, x), run(graph, x))
        assert problems(result, case.adapter) == []
        check(result.graph)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_layer_of_a_packed_weight_has_its_own_rank_and_scale(dtype: str, mode: str, tmp_path: Path) -> None:
    case = lora_case(tmp_path, **PATTERNS)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed", dtype=dtype)
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    found = run(result.graph, X, result.adapter_file)
    assert error(found, answers(case.trained, X)) < (2e-6 if dtype == "float32" else 2e-3)
    assert problems(result, case.adapter) == []


@pytest.mark.parametrize("mode", ["fused", "swappable"])
@pytest.mark.parametrize("form", ["nbits", "packed_nbits", "dequant"])
def test_branches_beside_codes(form: str, mode: str, tmp_path: Path) -> None:
    """The branch alone is PEFT's: the codes are far from the base whatever was trained."""
    case = lora_case(tmp_path, inputs=32, **PATTERNS)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form)
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    x = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)
    moved = run(result.graph, x, result.adapter_file) - run(graph, x)
    assert error(moved, answers(case.trained, x) - answers(case.plain, x)) < 1e-5
    assert problems(result, case.adapter) == []


def test_the_base_data_is_untouched_and_the_sum_is_folded_at_load(tmp_path: Path) -> None:
    outputs = {"q_proj": 64, "k_proj": 64, "v_proj": 64}
    case = lora_case(tmp_path, inputs=96, outputs=outputs)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    data = graph.with_name("model.onnx.data").read_bytes()
    kinds = []
    for mode in ("plain", "tiled", "fused"):
        file = graph
        if mode != "plain":
            result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, onnx=graph)
            file = result.graph
            assert (result.output / "model.onnx.data").read_bytes() == data
            added = (result.output / "fossil_shards.onnx.data").stat().st_size
            assert added < 4 * load_adapter(case.adapter).parameters + 64 * 12
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{mode}-optimised.onnx")
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
        kinds.append([node.op_type for node in optimised.graph.node])
    assert kinds[0] == kinds[1] != kinds[2]
    assert graph.with_name("model.onnx.data").read_bytes() == data


def test_one_graph_takes_adapters_of_both_kinds(tmp_path: Path) -> None:
    case = lora_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    before = run(graph, X)
    others = [
        lora_case(tmp_path, "high", 1, r=40),
        lora_case(tmp_path, "ranks", 2, **PATTERNS),
        lora_case(tmp_path, "one layer", 3, target_modules=["layers.1.q_proj"]),
        make_case(tmp_path, rank=5, adapter="tile"),
        make_case(tmp_path, rank=5, variant="mini", mini_r=4, targets=["k_proj"], adapter="mini"),
    ]
    for other in others:
        file = tmp_path / f"{other.adapter.name}.onnx_adapter"
        made = convert(other.adapter, file, to="onnx-adapter", base=case.base, graph=result.output)
        assert made.details["tensors"] == made.details["inputs"] == 4
        found = run(result.graph, X, file)
        assert error(found, answers(other.trained, X)) < 2e-6, other.adapter.name
        shutil.copyfile(file, result.adapter_file)
        assert problems(result, other.adapter) == [] != problems(result, case.adapter)
        if other.adapter.name == "one layer":
            assert np.array_equal(found[0], before[0])
    assert np.array_equal(run(result.graph, X), before)


def test_tiles_share_the_rows_of_their_one_matrix(tmp_path: Path) -> None:
    case = lora_case(tmp_path, r=2)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    tile = make_case(tmp_path, rank=5, adapter="tile")
    convert(tile.adapter, tmp_path / "tile.onnx_adapter", to="onnx-adapter", base=case.base, graph=result.output)
    ranks = {
        name: value.shape[1 if name.endswith("A") else 0]
        for file in (tmp_path / "tile.onnx_adapter", result.adapter_file)
        for name, value in _parameters(file).items()
        if file != result.adapter_file or name.startswith("layers.0")
    }
    assert ranks == {f"layers.{n}.qkv_proj.lora_{x}": 6 if n == 0 else 5 for n in (0, 1) for x in "AB"}


@pytest.mark.parametrize("mode", ["fused", "swappable"])
def test_trained_values_of_bfloat16_are_rounded_once(mode: str, tmp_path: Path) -> None:
    case = lora_case(tmp_path, **PATTERNS)
    file = case.adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    for name, parameter in case.trained.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    assert problems(result, case.adapter) == []
    assert error(run(result.graph, X, result.adapter_file), answers(case.trained, X)) < 2e-6
