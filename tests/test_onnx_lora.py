"""LoRA adapters in graphs: every mode against PEFT's unmerged model, swapped, checked value by value, and refused."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import edit_json, make_adapter
from graphs import Case, Stack, answers, make_case, make_graph, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, verify
from fossil_export.onnx._adapter_file import write_adapter
from fossil_export.onnx._signature import read_signature
from fossil_export.onnx.builders import BUILDERS
from fossil_export.onnx.graph._check import check
from fossil_export.verifying._shards import _parameters, check_shards

MODES = ["merged", "tiled", "fused", "swappable"]
OUTPUTS = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
X = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
PATTERNS: dict[str, Any] = {
    "lora_alpha": 13,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3, r"layers\.1\.v_proj": 7},
    "alpha_pattern": {"v_proj": 5},
}
"""Scales that no float32 is, and another rank in each layer of a packed weight."""


def lora_case(
    folder: Path,
    name: str = "lora",
    seed: int = 0,
    inputs: int = 24,
    outputs: dict[str, int] | None = None,
    **config: Any,
) -> Case:
    """The model of `make_case`, with a LoRA that PEFT made and saved, every value of it moved."""
    outputs = outputs or OUTPUTS
    case = make_case(folder, inputs, outputs, rank=1, adapter="tile of rank 1")
    copy = Stack(inputs, outputs, 2, False).eval()
    copy.load_state_dict(case.plain.state_dict())
    config = {"r": 4, "target_modules": list(outputs)} | config
    trained = get_peft_model(copy, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in trained.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    trained.save_pretrained(folder / name)
    return Case(case.base, folder / name, trained, case.plain)


def error(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - want) / np.linalg.norm(want))


def problems(result: Any, adapter: Path) -> list[str]:
    return check_shards(result.output, load_adapter(adapter))


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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that GenAI's builder can read."""
    base = tmp_path_factory.mktemp("llama") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 120}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(base)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(120)}, unk_token="w0"))  # type: ignore[no-untyped-call]
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def llama_lora(llama: Path) -> Path:
    """Trained on all linear layers, the head too, in several ranks."""
    folder = llama.parent / "lora"
    patterns = {"rank_pattern": {"q_proj": 3, "lm_head": 2}, "alpha_pattern": {"v_proj": 5}}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    make_adapter(folder, llama, kind=LoraConfig, lora_alpha=13, target_modules=targets, **patterns)
    return folder


@pytest.fixture(scope="module")
def plain(llama: Path) -> Callable[[str], Path]:
    """Plain graphs, each made once: of a builder, or of one and a precision."""

    @functools.cache
    def made(what: str) -> Path:
        runtime, _, precision = what.partition(" ")
        if runtime == "genai":
            pytest.importorskip("onnxruntime_genai")
        return BUILDERS[runtime].build(llama, llama.parent / what, precision or "fp32", "cpu")

    return made


@pytest.mark.parametrize("what", ["torch", "genai", "genai int4"])
@pytest.mark.parametrize("mode", MODES)
def test_graphs_of_both_builders_are_the_trained_model(
    mode: str, what: str, plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    coded = what.endswith("int4")
    if coded and mode in ("merged", "tiled"):
        with pytest.raises(FossilExportError, match="are quantized, and shards cannot be added to codes"):
            export_onnx(llama_lora, tmp_path / "out", mode=mode, onnx=plain(what))
        return
    result = export_onnx(llama_lora, tmp_path / "out", mode=mode, onnx=plain(what), copy_data=True)
    found = verify(result.output, base=llama, adapter=llama_lora)
    assert found.parity, found.problems
    assert found.forward is not None and found.forward.artifact.relative_error < 1e-5
    if mode in ("fused", "swappable"):
        assert verify(result.output, base=llama, adapter=llama_lora, level="weights").parity
    if mode == "fused" and what == "torch":  # as if the alphas of the trainer had been others
        other = tmp_path / "other"
        shutil.copytree(llama_lora, other)
        edit_json(other / "adapter_config.json", alpha_pattern={"v_proj": 6})
        wrong = verify(result.output, base=llama, adapter=other)
        assert not wrong.parity and any("v_proj: its lora_B in the graph" in line for line in wrong.problems)
        assert wrong.forward is not None and wrong.forward.artifact.relative_error > 1e-4


def test_genai_swaps_adapters_of_both_kinds(
    plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    result = export_onnx(llama_lora, tmp_path / "out", mode="swappable", onnx=plain("genai"))
    make_adapter(tmp_path / "tile", llama)
    tile = convert(tmp_path / "tile", tmp_path / "tile.onnx_adapter", to="onnx-adapter", graph=result.output).output
    model = og.Model(str(result.output))
    adapters = og.Adapters(model)
    for name, file in (("lora", result.adapter_file), ("tile", tile)):
        adapters.load(str(file), name)

    def logits(name: str | None) -> np.ndarray:
        generator = og.Generator(model, og.GeneratorParams(model))
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.arange(2, 9, dtype=np.int32))
        return np.array(generator.get_logits()).ravel()

    before = logits(None)
    for name, folder in (("lora", llama_lora), ("tile", tmp_path / "tile")):
        assert error(logits(name), _live(llama, folder)) < 1e-5
    assert np.array_equal(logits(None), before) and error(before, _live(llama, llama_lora)) > 1e-3


def test_a_head_is_the_bases_or_refused(
    plain: Callable[[str], Path], llama: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """PEFT saves the weight of a head beside what it trained; nothing is said of it if it is the base's."""
    result = export_onnx(llama_lora, tmp_path / "out", mode="swappable", onnx=plain("torch"))
    assert not any("trained whole" in warning for warning in result.warnings)
    make_adapter(tmp_path / "none", llama, kind=LoraConfig, target_modules=["v_proj"])
    other = tmp_path / "other"
    shutil.copytree(llama_lora, other)
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, other / "adapter_model.safetensors")
    convert(tmp_path / "none", tmp_path / "none.onnx_adapter", to="onnx-adapter", graph=result.output)
    with pytest.raises(FossilExportError, match=r"differ in whole trained tensors \(lm_head.weight\)"):
        convert(other, tmp_path / "no", to="onnx-adapter", graph=result.output)


def _live(base: Path, adapter: Path) -> np.ndarray:
    """PEFT's own logits of the last position."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double().eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.arange(2, 9)[None]).logits[0, -1].numpy()
    return found


def test_an_embedding_is_merged_and_refused_elsewhere(llama: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "lora", llama, kind=LoraConfig, target_modules=["embed_tokens", "q_proj"])
    assert verify(export_onnx(tmp_path / "lora", tmp_path / "merged", runtime="torch").output).parity
    for mode in ("tiled", "fused", "swappable"):
        with pytest.raises(FossilExportError, match=r"of model.embed_tokens \(lora_embedding\) is no .*--mode merged"):
            export_onnx(tmp_path / "lora", tmp_path / "no", mode=mode, runtime="torch")
    with pytest.raises(
        FossilExportError, match=r"more than weights of linear layers \(model.embed_tokens\).*--onnx out"
    ):
        export_onnx(tmp_path / "lora", tmp_path / "no", onnx=tmp_path / "merged")


def test_a_bias_of_lora_is_no_branch(tmp_path: Path) -> None:
    case = lora_case(tmp_path, lora_bias=True)
    graph = make_graph(case, tmp_path / "model.onnx")
    for mode in ("tiled", "fused", "swappable"):
        with pytest.raises(FossilExportError, match=r"q_proj\.bias.*\(lora_bias\) is no .*; use --mode merged"):
            export_onnx(case.adapter, tmp_path / "no", base=case.base, mode=mode, onnx=graph)
    with pytest.raises(FossilExportError, match=r"more than weights of linear layers \(layers.0.k_proj.bias"):
        export_onnx(case.adapter, tmp_path / "no", base=case.base, onnx=graph)
