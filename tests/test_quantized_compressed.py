"""Bases of compressed-tensors in 8 and 4 bits, against the library's own decompression."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_bases import linears, merged_equal, plain_model, write
from quantized_scaled import MODULE, checkpoint, encoded, fp8_codes, same, scales, values
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig, LlamaForCausalLM

from fossil_export.errors import CheckpointError

WEIGHT = f"{MODULE}.weight"


def config(form: str, **weights: Any) -> dict[str, Any]:
    """Settings with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def decompressed(form: str, weights: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the library makes of the tensors of one module."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    own = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    return BaseCompressor.get_value_from_registry(form).decompress(own, scheme)["weight"]


def stored(**own: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{MODULE}.{name}": value for name, value in own.items()}


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(["tensor", "channel", "group", "block"]),
    kind=st.sampled_from(["float", "int"]),
    form=st.sampled_from(["own", "naive-quantized"]),
    symmetric=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    unit=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 8)),
    scale=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 9),
)
def test_weights_are_what_the_library_decompresses(
    strategy: str,
    kind: str,
    form: str,
    symmetric: bool,
    size: Any,
    unit: Any,
    cut: Any,
    scale: torch.dtype,
    dtype: str,
    seed: int,
) -> None:
    rows, columns = size[0] * unit[0], size[1] * unit[1]
    if strategy == "block":  # the last blocks may be cut
        rows, columns = rows - min(cut[0], unit[0] - 1), columns - min(cut[1], unit[1] - 1)
    grid = {"tensor": (1,), "channel": (rows, 1), "group": (rows, size[1]), "block": size}[strategy]
    weights: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": strategy}
    weights |= {"group": {"group_size": unit[1]}, "block": {"block_structure": list(unit)}}.get(strategy, {})
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    own = {"weight": fp8_codes(rows, columns, seed=seed) if kind == "float" else whole}
    own["weight_scale"] = scales(*grid, seed=seed).to(scale)
    if not symmetric:
        zeros = torch.randint(-128, 128, grid, generator=generator)
        own["weight_zero_point"] = zeros.to(torch.int8) if kind == "int" else (zeros / 16).to(torch.float8_e4m3fn)
    form = {"float": "float-quantized", "int": "int-quantized"}[kind] if form == "own" else form
    tensors = stored(**own) | {f"{MODULE}.input_scale": torch.ones(1)}
    with tempfile.TemporaryDirectory() as folder:
        opened = checkpoint(Path(folder), tensors, config(form, **weights), dtype)
        truth = decompressed(form, weights, stored(**own)).to(getattr(torch, dtype))
        assert same(values(opened, WEIGHT), truth)
        assert same(values(opened, WEIGHT, rows // 2, rows), truth[rows // 2 :])
        assert set(opened.tensors) == {WEIGHT} and "quantization_config" not in (opened.config or {})


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("kind,strategy", [("float", "tensor"), ("float", "block"), ("int", "channel")])
def test_a_merge_is_that_of_the_model_that_transformers_dequantizes(kind: str, strategy: str, tmp_path: Path) -> None:
    base = plain_model(tmp_path / "plain")
    form = {"float": "float-quantized", "int": "int-quantized"}[kind]
    weights: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": [64, 64]} if strategy == "block" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    tensors = load_file(base / "model.safetensors")
    for name in linears(tensors):
        value = tensors.pop(name)
        scale, _ = calculate_qparams(*spans(value, strategy, (64, 64)), scheme.weights)
        own = BaseCompressor.get_value_from_registry(form).compress({"weight": value, "weight_scale": scale}, scheme)
        tensors |= {f"{name.removesuffix('weight')}{part}": one for part, one in own.items()}
    quantized = write(tmp_path / "quantized", base, tensors, config(form, **weights))
    how = CompressedTensorsConfig.from_dict(config(form, **weights) | {"dequantize": True})
    model = LlamaForCausalLM.from_pretrained(quantized, quantization_config=how, dtype=torch.bfloat16)
    truth = {name: value.contiguous() for name, value in model.state_dict().items()}
    (tmp_path / "dequantized").mkdir()
    save_file(truth, tmp_path / "dequantized" / "model.safetensors", {"format": "pt"})
    (tmp_path / "dequantized" / "config.json").write_bytes((base / "config.json").read_bytes())
    merged_equal(quantized, tmp_path / "dequantized", tmp_path)


FP4 = {"num_bits": 4, "type": "float", "symmetric": True}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_groups_with_small_scales(form: str, dtype: str, tmp_path: Path) -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    if form.startswith("nvfp4"):
        weights = FP4 | {"strategy": "tensor_group", "group_size": 16}
        own = {"weight_packed": packed, "weight_scale": scales(4, 8).mul(100).to(torch.float8_e4m3fn)}
        own["weight_global_scale"] = torch.tensor([3141.5])
    else:
        weights = FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        own = {"weight_packed": packed, "weight_scale": torch.arange(1, 17, dtype=torch.uint8).reshape(4, 4) * 15}
        if form.startswith("mxfp8"):
            weights["num_bits"] = 8
            own = {"weight": fp8_codes(4, 128), "weight_scale": own["weight_scale"]}
    opened = checkpoint(tmp_path, stored(**own), config(form, **weights), dtype)
    truth = decompressed(form, weights, stored(**own)).to(getattr(torch, dtype))
    assert same(values(opened, WEIGHT), truth)


def test_groups_of_one_model_in_forms_of_their_own(tmp_path: Path) -> None:
    """Names go before patterns, and patterns before classes; who ignores comes first of all."""
    per_row = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    by_tensor = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    settings = config("mixed-precision", **per_row) | {"ignore": ["re:.*gate", "lm_head"], "version": "0.20.0"}
    settings["config_groups"]["group_0"]["format"] = "int-quantized"
    settings["config_groups"]["group_1"] = {
        "targets": ["re:.*experts.*"],
        "weights": by_tensor,
        "format": "float-quantized",
    }
    QuantizationConfig(**settings)
    rows = {"model.a.weight": torch.arange(24).to(torch.int8).reshape(4, 6), "model.a.weight_scale": scales(4, 1)}
    expert = {"model.experts.0.up.weight": fp8_codes(4, 6), "model.experts.0.up.weight_scale": scales(1)}
    left = {"model.experts.gate.weight": torch.ones(2, 6, dtype=torch.bfloat16), "lm_head.weight": torch.ones(2, 6)}
    opened = checkpoint(tmp_path, rows | expert | left, settings)
    assert same(values(opened, "model.a.weight"), decompressed("int-quantized", per_row, rows).bfloat16())
    truth = decompressed("float-quantized", by_tensor, expert).bfloat16()
    assert same(values(opened, "model.experts.0.up.weight"), truth)
    assert all(same(values(opened, name), value) for name, value in left.items())


PER_ROW = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
GOOD = {"weight": fp8_codes(4, 6), "weight_scale": scales(4, 1)}
CONFIG = config("float-quantized", **PER_ROW)
GROUP = CONFIG["config_groups"]["group_0"]


def group(**entries: Any) -> dict[str, Any]:
    return CONFIG | {"config_groups": {"group_0": GROUP | entries}}


WRONG = {
    "no scale": ({"weight": GOOD["weight"]}, CONFIG, "has no .*weight_scale beside it"),
    "a scale of another shape": (GOOD | {"weight_scale": scales(6, 1)}, CONFIG, r"weight_scale .* must be \[4, 1\]"),
    "a scale of another dtype": (GOOD | {"weight_scale": scales(4, 1).double()}, CONFIG, "is F64, which no scale"),
    "NaN in a scale": (GOOD | {"weight_scale": scales(4, 1) * torch.nan}, CONFIG, "weight_scale holds infinite or NaN"),
    "whole numbers for fp8": (GOOD | {"weight": GOOD["weight"].to(torch.int8)}, CONFIG, "is I8, but .* 8 bits, float"),
    "no zero points": (GOOD, config("float-quantized", **PER_ROW | {"symmetric": False}), "has no .*weight_zero_point"),
    "zero points of another shape": (
        GOOD | {"weight_zero_point": torch.zeros(4, dtype=torch.int8)},
        CONFIG,
        "weight_zero_point .* must be",
    ),
    "a weight that is ignored": (GOOD, CONFIG | {"ignore": ["re:.*up_proj"]}, "is quantized, but .* has no weights"),
    "one that is ignored by name": (GOOD, CONFIG | {"ignore": [MODULE]}, "is quantized, but .* has no weights"),
    "a weight that is no target": (GOOD, group(targets=["re:.*down_proj"]), "is quantized, but .* has no weights"),
    "floats that are rounded as they run": (
        GOOD | {"weight": torch.ones(4, 6)},
        CONFIG | {"quantization_status": "frozen"},
        "weight_scale .* floats that the model rounds as it runs",
    ),
    "no weight for a scale": ({"weight_scale": scales(4, 1)}, CONFIG, "belongs to a weight that is not there"),
    "an order of columns": (GOOD | {"weight_g_idx": torch.arange(6)}, CONFIG, "weight_g_idx .* has no meaning"),
    "nothing quantized": ({"bias": torch.ones(4)}, CONFIG, "says that weights are quantized, and none is"),
    "a sparse form": (GOOD, CONFIG | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "rotations": (GOOD, CONFIG | {"transform_config": {"config_groups": {"u": {}}}}, "has a transform_config"),
    "codes that nothing has a meaning for": (
        GOOD | {"codes": fp8_codes(4, 6)},
        CONFIG,
        r"up_proj\.codes .* is stored as F8_E4M3, and config.json does not say how to read it",
    ),
    "pruned experts": (GOOD, CONFIG | {"moe_sparsity_config": {"experts": 3}}, "its experts are pruned"),
    "a form that is not known": (GOOD, group(format="marlin-24"), "is stored as 'marlin-24'"),
    "a field that is not known": (GOOD, CONFIG | {"twist": 1}, "has the field 'twist' in quantization_config"),
    "one in a group": (GOOD, group(twist=1), "has the field 'twist' in config_groups.group_0"),
    "one of the weights": (GOOD, group(weights=PER_ROW | {"twist": 1}), "'twist' in config_groups.group_0.weights"),
    "activations that are no map": (GOOD, group(input_activations=0.5), "group_0.input_activations as 0.5, not a map"),
    "a preset": (GOOD, CONFIG | {"config_groups": {"FP8": ["Linear"]}}, "a preset; write its scheme out"),
    "no groups": (GOOD, CONFIG | {"config_groups": None}, "has config_groups as None"),
    "groups of no size": (GOOD, group(weights=PER_ROW | {"strategy": "group"}), "strategy 'group' and group_size None"),
    "blocks of no size": (GOOD, group(weights=PER_ROW | {"strategy": "block"}), "'block' and block_structure None"),
    "groups that do not divide": (
        GOOD,
        group(weights=PER_ROW | {"strategy": "group", "group_size": 4}),
        "has 6 columns, which groups of 4 do not divide",
    ),
    "dynamic weights": (GOOD, group(weights=PER_ROW | {"dynamic": True}), "dynamic as True, not false"),
    "a broken pattern": (GOOD, CONFIG | {"ignore": ["re:("]}, r"pattern 're:\(', which is not a valid"),
    "a status that is none": (GOOD, CONFIG | {"quantization_status": "melted"}, "quantization_status as 'melted'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    own, settings, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        values(checkpoint(tmp_path, stored(**own), settings), WEIGHT)


def test_an_older_config_says_frozen_of_codes_and_is_read(tmp_path: Path) -> None:
    old = CONFIG | {"quantization_status": "frozen", "sparsity_config": {"format": "dense"}, "kv_cache_scheme": None}
    opened = checkpoint(tmp_path, stored(**GOOD), None, compression_config=old)
    assert same(values(opened, WEIGHT), decompressed("float-quantized", PER_ROW, stored(**GOOD)).bfloat16())


def spans(values: torch.Tensor, strategy: str, unit: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest values, as the library's observers reduce them."""
    if strategy == "tensor":
        return values.amin().reshape(1), values.amax().reshape(1)
    if strategy == "channel":
        return values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    rows, columns = (1, unit[1]) if strategy in ("group", "tensor_group") else unit
    parts = values.reshape(values.shape[0] // rows, rows, values.shape[1] // columns, columns)
    return parts.amin((1, 3)), parts.amax((1, 3))


@settings(max_examples=50, deadline=None)
@given(
    strategy=st.sampled_from(["tensor", "channel", "group", "block"]),
    kind=st.sampled_from(["float", "int"]),
    bits=st.sampled_from([8, 8, 5]),
    symmetric=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    unit=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    scale=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_values_are_quantized_as_the_library_quantizes_them(
    strategy: str, kind: str, bits: int, symmetric: bool, size: Any, unit: Any, scale: torch.dtype, seed: int
) -> None:
    weights: dict[str, Any] = {"num_bits": 8 if kind == "float" else bits, "type": kind, "symmetric": symmetric}
    weights |= {"strategy": strategy}
    weights |= {"group": {"group_size": unit[1]}, "block": {"block_structure": list(unit)}}.get(strategy, {})
    given_values = torch.randn(size[0] * unit[0], size[1] * unit[1], generator=torch.Generator().manual_seed(seed))
    given_values[0] += 3  # never all zero: the library has no zero point then
    form = {"float": "float-quantized", "int": "int-quantized"}[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    least, most = spans(given_values, strategy, unit)
    own_scale, zeros = calculate_qparams(least, most, scheme.weights)
    own = {"weight": given_values, "weight_scale": own_scale.to(scale)} | (
        {} if symmetric else {"weight_zero_point": zeros}
    )
    truth = stored(**BaseCompressor.get_value_from_registry(form).compress(own, scheme))
    with tempfile.TemporaryDirectory() as folder:
        opened = checkpoint(Path(folder), truth, config(form, **weights))
        found = encoded(opened, WEIGHT, given_values)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(found[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_groups_with_small_scales_are_quantized_as_the_library_does(form: str, tmp_path: Path) -> None:
    given_values = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) * scales(6, 64)
    given_values[2, :32] = 0
    weights = FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    own: dict[str, Any] = {"weight": given_values}
    if form.startswith("nvfp4"):
        weights = FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
        own["weight_global_scale"] = generate_gparam(given_values.amin(), given_values.amax())
    elif form.startswith("mxfp8"):
        weights["num_bits"] = 8
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    least, most = spans(given_values, "group", (1, weights["group_size"]))
    scale, _ = calculate_qparams(least, most, scheme.weights, own.get("weight_global_scale"))
    own["weight_scale"] = scale
    truth = stored(**BaseCompressor.get_value_from_registry(form).compress(own, scheme))
    opened = checkpoint(tmp_path, truth, config(form, **weights | {"scale_dtype": str(weights["scale_dtype"])}))
    found = encoded(opened, WEIGHT, given_values)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(found[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name
