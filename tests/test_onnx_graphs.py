"""Rewritten graphs against PEFT's unmerged model: every form of a layer, every mode, any shape and rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import answers, error, make_case, make_graph, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fossil_export import convert, export_onnx, load_adapter
from fossil_export.onnx.graph._check import check

FLOAT_FORMS = ["matmul", "transpose", "cast", "packed"]
CODED_FORMS = ["nbits", "packed_nbits", "dequant"]


def shapes(rank: int, inputs: int, flat: bool) -> np.ndarray:
    lead = (5,) if flat else (2, 3)
    return np.random.default_rng(rank).standard_normal((*lead, inputs)).astype(np.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    inputs=st.integers(3, 40),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 9),
    form=st.sampled_from([*FLOAT_FORMS, "gemm", "gemm_transb"]),
    mode=st.sampled_from(["merged", "tiled", "fused", "swappable"]),
    bias=st.booleans(),
    names=st.booleans(),
    targets=st.sampled_from([None, ["q_proj", "v_proj"], ["k_proj"]]),
)
def test_float_graphs_answer_as_peft_does(
    inputs: int,
    widths: tuple[int, int, int],
    rank: int,
    form: str,
    mode: str,
    bias: bool,
    names: bool,
    targets: list[str] | None,
) -> None:
    flat = form.startswith("gemm")
    outputs = dict(zip(("q_proj", "k_proj", "v_proj"), widths, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make_case(folder, inputs, outputs, min(rank, inputs), bias=bias, targets=targets)
        graph = make_graph(case, folder / "plain" / "model.onnx", form, names=names, flat=flat)
        result = export_onnx(case.adapter, folder / "out", base=case.base, mode=mode, onnx=graph)
        x = shapes(rank, inputs, flat)
        held = 2e-3 if form == "cast" else 2e-6  # the graph's own weights are in float16
        assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < held
        if mode == "swappable":
            assert np.array_equal(run(result.graph, x), run(graph, x))
        check(result.graph)


@pytest.mark.parametrize("mode", ["merged", "tiled"])
@pytest.mark.parametrize("form", [*FLOAT_FORMS, "gemm", "gemm_transb"])
def test_bat_in_graphs(form: str, mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, variant="bat", rank=4)
    flat = form.startswith("gemm")
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form, flat=flat)
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    x = shapes(4, 24, flat)
    assert error(run(result.graph, x), answers(case.trained, x)) < (2e-3 if form == "cast" else 2e-6)


@pytest.mark.parametrize("mode", ["merged", "tiled", "fused", "swappable"])
def test_mini_in_graphs(mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, variant="mini", rank=5, mini_r=4)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    x = shapes(4, 24, False)
    assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < 2e-6


@pytest.mark.parametrize("mode", ["fused", "swappable"])
@pytest.mark.parametrize("form", CODED_FORMS)
@pytest.mark.parametrize("names", [True, False])
def test_branches_beside_quantized_weights(form: str, mode: str, names: bool, tmp_path: Path) -> None:
    """The branch alone is PEFT's: the difference to the plain graph, whose codes are far from the base."""
    case = make_case(tmp_path, inputs=32, rank=6)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form, names=names)
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    x = shapes(3, 32, False)
    moved = run(result.graph, x, result.adapter_file) - run(graph, x)
    assert error(moved, answers(case.trained, x) - answers(case.plain, x)) < 1e-5
    if mode == "swappable":
        assert np.array_equal(run(result.graph, x), run(graph, x))


@pytest.mark.parametrize("mode", ["merged", "tiled", "fused", "swappable"])
@pytest.mark.parametrize("form", ["matmul", "packed"])
def test_float16_graphs_round_once(form: str, mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, rank=5)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form, dtype="float16")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    x = shapes(3, 24, False)
    assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < 2e-3


@pytest.mark.parametrize("rank", [1, 3, 5, 12, 24])
def test_one_swappable_graph_takes_any_rank(rank: int, tmp_path: Path) -> None:
    case = make_case(tmp_path, rank=4)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    other = make_case(tmp_path, rank=rank, seed=7, adapter="other", targets=["v_proj"])
    made = convert(
        other.adapter, tmp_path / "other.onnx_adapter", to="onnx-adapter", base=case.base, graph=result.output
    )
    x = shapes(3, 24, False)
    assert error(run(result.graph, x, made.output), answers(other.trained, x)) < 2e-6
    assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < 2e-6
    assert np.array_equal(run(result.graph, x), run(graph, x))


def test_adapter_of_some_layers_only(tmp_path: Path) -> None:
    """Where a kind of layers is trained in one layer, the others keep the base's answers."""
    case = make_case(tmp_path, rank=4)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    some = make_case(tmp_path, rank=3, seed=3, adapter="some", targets=["layers.1.q_proj"])
    made = convert(some.adapter, tmp_path / "some.onnx_adapter", to="onnx-adapter", base=case.base, graph=result.output)
    x = shapes(3, 24, False)
    found = run(result.graph, x, made.output)
    assert error(found, answers(some.trained, x)) < 2e-6
    assert np.array_equal(found[0], run(graph, x)[0])


@pytest.mark.parametrize("names", [True, False])
def test_module_that_is_apart_in_the_graph(names: bool, tmp_path: Path) -> None:
    """A model with a packed layer, exported with its parts apart, as GenAI's builder does for phi3."""
    apart = make_case(tmp_path)
    packed = {"qkv_proj": 32}
    (tmp_path / "packed").mkdir()
    case = make_case(tmp_path / "packed", outputs=packed, rank=5)
    for index, layer in enumerate(case.plain.layers):
        rows = layer.qkv_proj.weight.data
        for name, (start, stop) in {"q_proj": (0, 16), "k_proj": (16, 24), "v_proj": (24, 32)}.items():
            getattr(apart.plain.layers[index], name).weight.data = rows[start:stop].clone()
    graph = make_graph(apart, tmp_path / "plain" / "model.onnx", names=names)
    x = shapes(3, 24, False)
    if not names:
        with pytest.raises(Exception, match="has no place for"):
            export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph)
        return
    for mode in ("merged", "tiled", "fused", "swappable"):
        result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, onnx=graph)
        assert error(run(result.graph, x, result.adapter_file), answers(case.trained, x)) < 2e-6


def test_weight_read_twice_gets_one_shard(tmp_path: Path) -> None:
    case = make_case(tmp_path, depth=1)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", external=False)
    model = onnx.load(graph)
    again = next(node for node in model.graph.node if node.op_type == "MatMul")
    second = onnx.helper.make_node("MatMul", list(again.input), ["again"], "/second/MatMul")
    model.graph.node.append(second)
    model.graph.output.append(onnx.helper.make_tensor_value_info("again", 1, ["batch", "sequence", None]))
    onnx.save(model, graph)
    for mode in ("merged", "tiled", "fused", "swappable"):
        result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, onnx=graph)
        written = onnx.load(result.graph, load_external_data=False)
        assert len(written.graph.output) == 2
        import onnxruntime as ort

        options, quiet = ort.RunOptions(), ort.SessionOptions()
        quiet.log_severity_level = 3
        if result.adapter_file:
            loaded = ort.LoraAdapter()
            loaded.Load(str(result.adapter_file))
            options.add_active_adapter(loaded)
        first, other = ort.InferenceSession(str(result.graph), quiet).run(None, {"x": shapes(3, 24, False)}, options)
        assert np.allclose(first[..., :16], other, rtol=1e-5, atol=1e-5), mode


def test_unknown_ranks_of_activations(tmp_path: Path) -> None:
    """A graph without shapes: branches find out at run time."""
    case = make_case(tmp_path, rank=5)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", external=False)
    model = onnx.load(graph)
    cut = onnx.helper.make_node("Reshape", ["flat", "sizes"], ["x"], "unknown")  # nothing tells the rank of x
    model.graph.node.insert(0, cut)
    del model.graph.input[:]
    for name, kind in (("flat", 1), ("sizes", 7)):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, ["any"]))
    for output in model.graph.output:
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, 1, ["a", "b", "c"]))
    onnx.save(model, graph)
    x = shapes(3, 24, False)
    for mode in ("fused", "swappable"):
        result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, onnx=graph)
        found = run(result.graph, x, result.adapter_file, feeds={"flat": x.ravel(), "sizes": np.array(x.shape)})
        assert error(found, answers(case.trained, x)) < 2e-6


def test_names_say_which_layer_a_branch_belongs_to(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "nbits")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=graph)
    written = onnx.load(result.graph, load_external_data=False)
    gemms = [node.name for node in written.graph.node if node.op_type == "Gemm"]
    assert gemms[0].endswith("layers.0.q_proj/fossil/Gemm") and len(gemms) == 6
    assert sum(node.op_type == "ReduceSum" for node in written.graph.node) == 1  # one x, one sum


def test_tiled_shares_the_base_data(tmp_path: Path) -> None:
    case = make_case(tmp_path, inputs=96, outputs={"q_proj": 64, "k_proj": 64, "v_proj": 64})
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    data = graph.with_name("model.onnx.data")
    shared = export_onnx(case.adapter, tmp_path / "shared", base=case.base, mode="tiled", onnx=graph)
    copied = export_onnx(case.adapter, tmp_path / "copied", base=case.base, mode="tiled", onnx=graph, copy_data=True)
    for result in (shared, copied):
        assert result.output.joinpath(data.name).read_bytes() == data.read_bytes()
    linked = shared.output.joinpath(data.name).stat().st_nlink > 1
    assert bool(shared.warnings) == linked and not copied.warnings
    assert copied.output.joinpath(data.name).stat().st_nlink == 1
    onnx.checker.check_model(str(copied.graph), full_check=True)
    shards = load_adapter(case.adapter).parameters * 4
    assert (shared.output / "fossil_shards.onnx.data").stat().st_size < shards + 96 * 4 * 4 + 100


def test_runtime_folds_the_tiling_away(tmp_path: Path) -> None:
    import onnxruntime as ort

    case = make_case(tmp_path, rank=5)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="tiled", onnx=graph)
    kinds = []
    for source in (graph, result.graph):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"optimised-{len(kinds)}.onnx")
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
        kinds.append([node.op_type for node in optimised.graph.node])
    assert kinds[0] == kinds[1]
