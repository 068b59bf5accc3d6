"""Bases in AWQ: as PyTorch dequantizes them, quantized again to the same codes, and refused in other versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_bases import merged_equal
from quantized_int4 import awq, folder_of, with_settings
from quantized_rows import encoded, opened, rows

from fossil_export.errors import CheckpointError

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("auto_round", [False, True])
def test_a_merge_is_that_of_the_dequantized_base(auto_round: bool, tmp_path: Path) -> None:
    said = SETTINGS | {"modules_to_not_convert": ["lm_head"]}
    if auto_round:
        said |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    found = folder_of(tmp_path, lambda shape, name: awq(shape), said)
    merged_equal(found.quantized, found.dequantized, tmp_path)


def test_old_folders_say_it_beside_their_config(tmp_path: Path) -> None:
    found = folder_of(tmp_path, lambda shape, name: awq(shape), SETTINGS)
    beside = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    merged_equal(with_settings(found.quantized, None, beside), found.dequantized, tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_are_what_pytorch_computes(data: st.DataObject, tmp_path: Path) -> None:
    outputs, inputs = 8 * data.draw(st.integers(1, 9)), 32 * data.draw(st.integers(1, 4))
    group = data.draw(st.sampled_from([-1, 16, 32]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dtype, tiny = data.draw(st.sampled_from(["float16", "bfloat16"])), data.draw(st.booleans())
    case = awq((outputs, inputs), group, dtype=dtype, tiny=tiny)
    start = data.draw(st.integers(0, outputs - 1))
    stop = data.draw(st.integers(start + 1, outputs))
    found = rows(tmp_path, case.tensors, SETTINGS | {"group_size": group}, start, stop)
    assert found.dtype == case.value.dtype
    assert torch.equal(found.view(torch.int16), case.value[start:stop].view(torch.int16))


def test_values_that_nobody_touched_have_their_codes_again(tmp_path: Path) -> None:
    torch.manual_seed(4)
    case = awq((72, 128), 32)
    found = encoded(tmp_path, case.tensors, SETTINGS | {"group_size": 32}, case.value.float())
    assert found.keys() == case.tensors.keys()
    for part, value in case.tensors.items():
        assert torch.equal(found[part], value), part


@pytest.mark.parametrize(
    ("said", "changed", "message"),
    [
        ({"version": "gemv"}, {}, "version of AWQ is 'gemv' in config.json; read is gemm"),
        ({"version": "GEMV_FAST"}, {}, "version of AWQ is 'gemv_fast' in config.json"),
        ({"backend": "llm-awq"}, {}, "version of AWQ is 'llm-awq' in config.json"),
        ({"version": "exllama"}, {}, "version of AWQ is 'exllama' in config.json"),
        ({"bits": 8}, {}, "bits is 8 in config.json; read are 4"),
        ({"group_size": 32}, {}, r"scales \[1, 64\] is not that of 64 inputs in groups of 32"),
        ({"group_size": None}, {}, "group_size is not there in config.json, no size"),
        ({}, {"qzeros": None}, r"qweight \[64, 8\] has no model.layers.0.mlp.up_proj.qzeros beside it"),
        ({}, {"qzeros": torch.zeros(1, 7).int()}, r"qzeros \[1, 7\] must be \[1, 8\]"),
        ({}, {"scales": torch.ones(1, 32).half()}, r"scales \[1, 32\] must be \[1, 64\]"),
        ({}, {"qweight": torch.zeros(64, 8)}, "is stored as F32, and must be a matrix of I32"),
        ({}, {"act.scales": torch.ones(64).half()}, "belongs to no quantized weight"),
        ({}, {"weight": torch.ones(64, 64).half()}, "has model.layers.0.mlp.up_proj.weight twice"),
    ],
)
def test_what_does_not_fit_is_refused(
    said: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in (awq((64, 64)).tensors | changed).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as raised:
        opened(tmp_path, tensors, SETTINGS | said)
    assert "\n" not in str(raised.value)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tensors = awq((64, 64)).tensors
    tensors["scales"][0, 3] = float("inf")
    with pytest.raises(CheckpointError, match=r"up_proj\.scales holds infinite or NaN values"):
        rows(tmp_path, tensors, SETTINGS, 0, 64)
