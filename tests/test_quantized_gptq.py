"""Bases in GPTQ: as PyTorch dequantizes them, quantized again to the same codes, and refused if they contradict
themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_bases import adapter_for, merged_equal
from quantized_int4 import Folders, folder_of, gptq, with_settings
from quantized_rows import encoded, opened, rows
from safetensors.torch import load_file

import fossil_export
from fossil_export.errors import CheckpointError

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}


def base(work: Path, said: dict[str, Any] | None = None, **drawn: Any) -> Folders:
    said = SETTINGS | (said or {})
    drawn = {"bits": said["bits"], "group": said["group_size"], "act": said["desc_act"], "sym": said["sym"]} | drawn
    return folder_of(work, lambda shape, name: gptq(shape, **drawn), said)


@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        ({}, {}),
        ({"bits": 3, "desc_act": True}, {}),
        ({"bits": 8, "sym": True, "group_size": -1}, {}),
        ({"bits": 2, "checkpoint_format": "gptq_v2"}, {"less_one": False}),
        ({"group_size": 128}, {"order": False}),  # a last group that is cut
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}, {}),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, {"less_one": False}),
    ],
)
def test_a_merge_is_that_of_the_dequantized_base(said: dict[str, Any], drawn: dict[str, Any], tmp_path: Path) -> None:
    found = base(tmp_path, said, **drawn)
    merged_equal(found.quantized, found.dequantized, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_are_what_pytorch_computes(data: st.DataObject, tmp_path: Path) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    outputs, inputs = (32 * data.draw(st.integers(1, 4)) for _ in range(2))
    group = data.draw(st.sampled_from([-1, 16, 32, 48]))
    act, sym, less_one, tiny = (data.draw(st.booleans()) for _ in range(4))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    case = gptq((outputs, inputs), bits, group, dtype=dtype, sym=sym, act=act, less_one=less_one, tiny=tiny)
    said = SETTINGS | {"bits": bits, "group_size": group, "desc_act": act, "sym": sym}
    said["checkpoint_format"] = "gptq" if less_one else "gptq_v2"
    start = data.draw(st.integers(0, outputs - 1))
    stop = data.draw(st.integers(start + 1, outputs))
    found = rows(tmp_path, case.tensors, said, start, stop)
    assert found.dtype == case.value.dtype
    assert torch.equal(found.view(torch.int16), case.value[start:stop].view(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("act", [False, True])
def test_values_that_nobody_touched_have_their_codes_again(bits: int, dtype: str, act: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    # bfloat16 does not tell steps apart that are more than 128 from the zero.
    case = gptq((96, 128), bits, 32, dtype=dtype, act=act, sym=bits == 8)
    said = SETTINGS | {"bits": bits, "group_size": 32, "desc_act": act}
    found = encoded(tmp_path, case.tensors, said, case.value.float())
    assert found.keys() == case.tensors.keys()
    for part, value in case.tensors.items():
        assert torch.equal(found[part].view(torch.uint8), value.view(torch.uint8)), part


def test_other_values_get_the_nearest_codes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    case = gptq((64, 64), 4, 32, sym=True, less_one=False)
    said = SETTINGS | {"group_size": 32, "checkpoint_format": "gptq_v2", "sym": True}
    scales = case.tensors["scales"].float().repeat_interleave(32, 0).T
    wanted = case.value.float() + (torch.rand(64, 64) - 0.5) * 4 * scales
    found = encoded(tmp_path, case.tensors, said, wanted)
    after = rows(tmp_path, {name: torch.as_tensor(value) for name, value in found.items()}, said, 0, 64).float()
    nearest = (wanted.clamp(-8 * scales, 7 * scales) - after).abs() / scales
    assert nearest.max() < 0.51 and (after != case.value.float()).float().mean() > 0.3


def test_a_merge_can_keep_the_format(tmp_path: Path) -> None:
    found = base(tmp_path, {"desc_act": True})
    adapter = adapter_for(found.dequantized, tmp_path / "adapter")
    fossil_export.merge(adapter, tmp_path / "again", base=found.quantized, requantize=True, min_survival=0)
    before = load_file(found.quantized / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) is not name.endswith("qweight"), name


def test_modules_may_have_settings_of_their_own(tmp_path: Path) -> None:
    said = SETTINGS | {"dynamic": {r"+:.*down_proj": {"bits": 8, "group_size": 32}, r"-:.*o_proj": {}}}

    def make(shape: tuple[int, int], name: str) -> Any:
        return gptq(shape, 8, 32) if "down_proj" in name else gptq(shape)

    found = folder_of(tmp_path, make, said)
    merged_equal(found.quantized, found.dequantized, tmp_path)


def test_old_folders_say_it_beside_their_config(tmp_path: Path) -> None:
    found = base(tmp_path)
    beside = {"bits": 4, "group_size": 64, "desc_act": False, "sym": False, "damp_percent": 0.01}
    merged_equal(with_settings(found.quantized, None, beside), found.dequantized, tmp_path)
    assert not (tmp_path / "of_quantized" / "quantize_config.json").exists()


def test_zeros_are_carried_from_one_to_the_next_if_gptqmodel_stored_them_so(tmp_path: Path) -> None:
    torch.manual_seed(6)
    case = gptq((32, 32), 4, 32, less_one=False)
    zeros = torch.zeros_like(case.tensors["qzeros"])  # sixteen zeros of 0, less one in one sum a word
    of_zero = gptq((32, 32), 4, 32, less_one=False).tensors | {"qzeros": zeros, "qweight": case.tensors["qweight"]}
    said = SETTINGS | {"group_size": 32, "meta": {"quantizer": ["gptqmodel:4.0.0"]}}
    wanted = rows(tmp_path, of_zero, said | {"checkpoint_format": "gptq_v2"}, 0, 32)
    stored = of_zero | {"qzeros": zeros - 0x11111111}
    assert torch.equal(rows(tmp_path, stored, said, 0, 32), wanted)
    stored["qzeros"] = torch.full_like(zeros, -1)
    with pytest.raises(CheckpointError, match="qzeros holds zeros of 15, less one, which loaders read as 0 or as 16"):
        rows(tmp_path, stored, SETTINGS | {"group_size": 32}, 0, 32)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"checkpoint_format": "marlin"}, "Marlin's order, which is not read"),
        ({"is_marlin_format": True}, "Marlin's order, which is not read"),
        ({"checkpoint_format": "gptq_p"}, "is 'gptq_p' in config.json; read are gptq and gptq_v2"),
        ({"bits": 5}, "bits is 5 in config.json; read are 2, 3, 4, 8"),
        ({"bits": 8}, r"up_proj.qzeros \[4, 32\] is not that of 256 outputs with 8 bits"),
        ({"group_size": 32}, r"up_proj.scales \[4, 256\] is not that of 256 inputs in groups of 32"),
        ({"group_size": 0}, "group_size is 0 in config.json, no size"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard' in config.json: layers that do more are not read"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16' in config.json; read is int32"),
        ({"dynamic": {"a": {"format": "marlin"}}}, "dynamic names a format of its own"),
        ({"dynamic": [1]}, "not settings by module; mend it"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "'auto_round:mlx' in config.json, which"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        opened(tmp_path, gptq((256, 256)).tensors, SETTINGS | said)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("said", "changed", "message"),
    [
        ({}, {"qzeros": None}, r"qweight \[32, 256\] has no model.layers.0.mlp.up_proj.qzeros beside it"),
        ({}, {"scales": None}, "has no model.layers.0.mlp.up_proj.scales beside it"),
        ({"desc_act": True}, {"g_idx": None}, "has no model.layers.0.mlp.up_proj.g_idx beside it"),
        ({}, {"scales": torch.ones(4, 128).half()}, r"scales \[4, 128\] must be \[4, 256\]"),
        ({}, {"scales": torch.ones(4, 256)}, "is stored as F32, and must be a matrix of F16 or BF16"),
        ({}, {"g_idx": torch.zeros(128).int()}, r"g_idx \[128\] is I32 and must be I32 \[256\]"),
        ({}, {"qweight": torch.zeros(3, 32, 256).int()}, "must be a matrix of I32; it is not read"),
        ({}, {"qzeros": torch.zeros(4, 31).int()}, "is not that of 256 outputs with 4 bits"),
        ({}, {"weight": torch.zeros(256, 256)}, "has model.layers.0.mlp.up_proj.weight twice"),
        ({}, {"act.scales": torch.ones(256)}, "belongs to no quantized weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    said: dict[str, Any], changed: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in (gptq((256, 256)).tensors | changed).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as raised:
        opened(tmp_path, tensors, SETTINGS | said)
    assert "\n" not in str(raised.value) and "up_proj" in str(raised.value)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda value: value + 1, "up_proj.g_idx names groups from 1 to 4, of 4 that there are"),
        ("g_idx", lambda value: value.flip(0), "groups out of order, which contradicts the config's desc_act false"),
        ("scales", lambda value: value * float("nan"), "up_proj.scales holds infinite or NaN values"),
        ("qzeros", lambda value: value * 0 + 0x11111111, "other zeros than 8, which contradicts the config's sym true"),
    ],
)
def test_values_that_no_quantizer_writes_are_refused(part: str, change: Any, message: str, tmp_path: Path) -> None:
    tensors = gptq((256, 256), sym=True).tensors
    with pytest.raises(CheckpointError, match=message):
        rows(tmp_path, tensors | {part: change(tensors[part])}, SETTINGS | {"sym": True}, 0, 256)


def test_a_config_that_says_so_of_plain_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="says that the model is quantized, and no weight is"):
        opened(tmp_path, {"weight": torch.zeros(8, 8)}, SETTINGS)


def test_a_plain_config_beside_quantized_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no quantization_config, though tensors are quantized"):
        opened(tmp_path, gptq((64, 64)).tensors, None)


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("transformer.h.0.attn.c_attn", {"model_type": "gpt2"}, "is of a Conv1D layer, which is not read"),
        ("model.embed_tokens", {"model_type": "llama"}, "is a quantized embedding, which is not read"),
    ],
)
def test_layers_that_lie_otherwise_are_refused(
    module: str, config: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, gptq((64, 64)).tensors, SETTINGS, module, **config)


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    torch.manual_seed(7)
    case = gptq((128, 64))
    found = rows(tmp_path, case.tensors, SETTINGS | {"lm_head": True}, 0, 128, module="lm_head")
    assert torch.equal(found, case.value)
