"""pack-quantized, against compressed-tensors itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_bases import merged_equal
from quantized_int4 import Case, folder_of
from quantized_rows import MODULE, opened, rows_of, torch_of

from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import CodedRows
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized import Stored
from fossil_export.checkpoints.quantized._packed import read_packed
from fossil_export.errors import CheckpointError


def said(bits: int = 4, group: int | None = 32, *, symmetric: bool = True, **other: Any) -> Any:
    strategy = "channel" if group is None else "group"
    found = {"bits": bits, "kind": "int", "symmetric": symmetric, "strategy": strategy, "group": group}
    return SimpleNamespace(**(found | {"actorder": None} | other))


def scheme(args: Any) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=args.bits, symmetric=args.symmetric, strategy=args.strategy, group_size=args.group
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressed(shape: tuple[int, int], args: Any, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """A random weight, as the library stores it."""
    groups = 1 if args.group is None else shape[1] // args.group
    half = 1 << args.bits - 1
    state = {
        "weight": torch.randn(shape).to(getattr(torch, dtype)),
        "weight_scale": (torch.rand(shape[0], groups) / half + 1e-5).to(getattr(torch, dtype)),
    }
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (shape[0], groups)).to(torch.int8)
    found: dict[str, torch.Tensor] = PackedQuantizationCompressor.compress(state, scheme(args))
    return found


def decompressed(state: dict[str, torch.Tensor], args: Any) -> torch.Tensor:
    found: torch.Tensor = PackedQuantizationCompressor.decompress(state, scheme(args))["weight"]
    return found


def weight_of(base: Checkpoint, args: Any) -> TensorInfo:
    stored = Stored("base", base.tensors, {}, None, partial(view_rows, base.home))
    return read_packed(stored, MODULE, args)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_are_what_the_library_decompresses(data: st.DataObject, tmp_path: Path) -> None:
    group = data.draw(st.sampled_from([None, 16, 24, 32]))
    args = said(data.draw(st.sampled_from([2, 3, 4, 7, 8])), group, symmetric=data.draw(st.booleans()))
    width = data.draw(st.integers(1, 70)) if group is None else group * data.draw(st.integers(1, 4))
    # The library cannot read zero points that are one word for each group.
    least = 1 if args.symmetric else 32 // args.bits + 1
    shape = data.draw(st.integers(least, 80)), width
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state = compressed(shape, args, data.draw(st.sampled_from(["bfloat16", "float16", "float32"])))
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    base = opened(tmp_path, state, None)
    weight = weight_of(base, args)
    assert weight.shape == shape
    found = torch_of(CodedRows(weight, partial(rows_of, base), start, stop)[:])
    wanted = decompressed(state, args)
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.uint8), wanted[start:stop].contiguous().view(torch.uint8))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_values_are_quantized_again_as_the_library_quantizes_them(
    bits: int, symmetric: bool, group: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    args = said(bits, group, symmetric=symmetric)
    state = compressed((48, 48), args, "float32")
    matrix = torch.randn(48, 48)
    base = opened(tmp_path, state, None)
    coding: Any = weight_of(base, args).coding
    found = coding.encoder(partial(rows_of, base)).encode(matrix.numpy())
    zeros = {}
    if not symmetric:
        library = PackedQuantizationCompressor.decompress(state, scheme(args))
        zeros = {"weight_zero_point": library["weight_zero_point"]}
    wanted = PackedQuantizationCompressor.compress(
        {"weight": matrix, "weight_scale": state["weight_scale"]} | zeros, scheme(args)
    )
    assert found.keys() == {f"{MODULE}.{part}" for part in state}
    for part, value in wanted.items():
        assert torch.equal(torch_of(found[f"{MODULE}.{part}"]), value), part


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_older_versions_are_those_of_each_input(symmetric: bool, tmp_path: Path) -> None:
    """By `weight_g_idx`, which later versions have no more: sorted by it, columns are in groups as they lie."""
    torch.manual_seed(9)
    args = said(4, 16, symmetric=symmetric, actorder="group")
    state = compressed((40, 64), args)
    order = torch.randperm(64)
    wanted = decompressed(state, args)
    unpacked = torch.stack([state["weight_packed"] >> 4 * place & 15 for place in range(8)], 2).reshape(40, 64)
    own = unpacked[:, order.argsort()]  # column i of it is column order[i] of the sorted one
    turned = torch.zeros(40, 8, dtype=torch.int64)
    for place in range(8):
        turned |= own[:, place::8].long() << 4 * place
    state["weight_packed"] = (turned - ((turned >> 31) << 32)).int()
    state["weight_g_idx"] = (order.argsort() // 16).int()
    base = opened(tmp_path, state, None)
    found = torch_of(CodedRows(weight_of(base, args), partial(rows_of, base), 0, 40)[:])
    assert torch.equal(found, wanted[:, order.argsort()])
    state["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    base = opened(tmp_path, state, None)
    found = torch_of(CodedRows(weight_of(base, args), partial(rows_of, base), 0, 40)[:])
    assert torch.equal(found, decompressed(state, args))
    for number in (0, -2, 2**31 - 1):  # the last one's count would take 17 GB
        state["weight_g_idx"] = torch.full((64,), number, dtype=torch.int32)
        base = opened(tmp_path, state, None)
        with pytest.raises(CheckpointError, match="weight_g_idx does not name each group 16 times"):
            CodedRows(weight_of(base, args), partial(rows_of, base), 0, 40)[:]


@pytest.mark.parametrize(
    ("args", "changed", "message"),
    [
        (said(), {"weight_scale": None}, "has no model.layers.0.mlp.up_proj.weight_scale; fetch that file again"),
        (said(), {"weight_shape": None}, "has no model.layers.0.mlp.up_proj.weight_shape"),
        (said(8), {}, r"weight_packed \[64, 8\] are not those of 8 bits in groups of 32"),
        (said(4, 16), {}, r"weight_packed \[64, 8\] are not those of 4 bits in groups of 16"),
        (said(4, None), {}, r"weight_packed \[64, 8\] are not those of 4 bits in channels"),
        (said(symmetric=False), {}, "has no weight_zero_point, but symmetric is False"),
        (said(), {"weight_zero_point": torch.zeros(8, 2).int()}, "has a weight_zero_point, but symmetric is True"),
        (said(symmetric=False), {"weight_zero_point": torch.zeros(7, 2).int()}, r"must be I32 \[8, 2\]"),
        (said(actorder="group"), {}, "has no model.layers.0.mlp.up_proj.weight_g_idx, which actorder asks for"),
        (said(), {"weight_g_idx": torch.zeros(63).int()}, r"weight_g_idx \[63\] is I32 and must be I32 \[64\]"),
        (said(), {"weight_packed": torch.zeros(2, 64, 8).int()}, "must be a matrix of I32"),
        (said(), {"weight_scale": torch.ones(63, 2)}, "and no scale of"),
        (said(strategy="tensor"), {}, "has int codes by tensor in config.json"),
        (said(kind="float"), {}, "has float codes by group in config.json"),
    ],
)
def test_what_does_not_fit_is_refused(args: Any, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = compressed((64, 64), said()) | changed
    base = opened(tmp_path, {name: value for name, value in state.items() if value is not None}, None)
    with pytest.raises(CheckpointError, match=message) as raised:
        weight_of(base, args)
    assert "\n" not in str(raised.value)


def test_a_shape_that_contradicts_the_codes_is_refused(tmp_path: Path) -> None:
    state = compressed((64, 64), said()) | {"weight_shape": torch.tensor([64, 63])}
    base = opened(tmp_path, state, None)
    with pytest.raises(CheckpointError, match=r"weight_shape says \[64, 63\], the tensors \[64, 64\]"):
        CodedRows(weight_of(base, said()), partial(rows_of, base), 0, 64)[:]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_merge_is_that_of_the_dequantized_base(symmetric: bool, tmp_path: Path) -> None:
    args = said(4, 64, symmetric=symmetric)

    def make(shape: tuple[int, int], name: str) -> Case:
        state = compressed(shape, args, "float16")
        return Case(decompressed(state, args), state)

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 64}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    found = folder_of(tmp_path, make, settings)
    merged_equal(found.quantized, found.dequantized, tmp_path)
