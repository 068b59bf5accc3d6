"""Fields of a quantization config that have a type no library gives them: one line, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_int4 import awq, gptq
from quantized_scaled import MODULE, checkpoint, fp8_codes, same, scales, values
from safetensors.torch import save_file

from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError

WEIGHT = f"{MODULE}.weight"
FP8 = {WEIGHT: fp8_codes(8, 16), f"{WEIGHT}_scale_inv": scales(1, 1)}
OF_ROWS = {WEIGHT: fp8_codes(8, 16), f"{WEIGHT}_scale": scales(8, 1)}
WHOLE = {WEIGHT: fp8_codes(8, 16), f"{WEIGHT}_scale": scales(1)}
GPTQ = {f"{MODULE}.{part}": value for part, value in gptq((32, 64), 4, 16, sym=True).tensors.items()}
AWQ = {f"{MODULE}.{part}": value for part, value in awq((32, 64), 16).tensors.items()}
MLX = {
    WEIGHT: torch.zeros(8, 8, dtype=torch.int32).view(torch.uint32),
    f"{MODULE}.scales": torch.ones(8, 2),
    f"{MODULE}.biases": torch.ones(8, 2),
}
MXFP4 = {
    "model.layers.0.mlp.experts.up_proj_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
    "model.layers.0.mlp.experts.up_proj_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
}


def compressed(**weights: Any) -> dict[str, Any]:
    own = {"num_bits": 8, "type": "float", "strategy": "channel"} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": own}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    "tensors,settings,field",
    [
        (FP8, {"quant_method": "fp8", "modules_to_not_convert": 5}, "modules_to_not_convert"),
        (FP8, {"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (FP8, {"quant_method": "fp8", "ignored_layers": {"lm_head": True}}, "ignored_layers"),
        (WHOLE, {"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo"),
        (WHOLE, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": 1}, "ignore"),
        (WHOLE, {"quant_method": "modelopt", "quant_algo": "FP8", "quantized_layers": [1]}, "quantized_layers"),
        (OF_ROWS, compressed(actorder=[1]), "actorder"),
        (GPTQ, {"quant_method": "gptq", "bits": [4], "group_size": 16}, "bits"),
        (GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": {}}, "group_size"),
        (GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": [1]}, "checkpoint_format"),
        (GPTQ, {"quant_method": "auto-round", "bits": 4, "group_size": 16, "packing_format": []}, "packing_format"),
        (AWQ, {"quant_method": "awq", "bits": [4], "group_size": 16}, "bits"),
        (MLX, {"bits": 4.0, "group_size": 32}, "4.0 bits"),
        (MXFP4, {"quant_method": "mxfp4", "modules_to_not_convert": 1}, "modules_to_not_convert"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint(tmp_path, tensors, settings)
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_without_blocks_in_the_config_may_have_one_scale_for_a_weight(shape: Any, tmp_path: Path) -> None:
    """As AutoFP8 writes it, and vLLM reads."""
    tensors = {WEIGHT: fp8_codes(300, 140), f"{WEIGHT}_scale": scales(1).reshape(shape)}
    tensors[f"{MODULE}.input_scale"] = scales(1)
    opened = checkpoint(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "static"})
    truth = (tensors[WEIGHT].float() * tensors[f"{WEIGHT}_scale"].reshape(())).bfloat16()
    assert same(values(opened, WEIGHT), truth) and set(opened.tensors) == {WEIGHT}


@pytest.mark.parametrize(
    "method,dtype", [("fbgemm_fp8", torch.int8), ("fbgemm_fp8", torch.float8_e4m3fnuz), ("fp8", torch.float8_e4m3fnuz)]
)
def test_codes_that_the_format_does_not_have_are_refused_and_not_copied(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = (FP8 if method == "fp8" else OF_ROWS) | {f"{MODULE}2.weight": torch.zeros(8, 16).to(dtype)}
    with pytest.raises(CheckpointError, match=f"{MODULE}2.weight"):
        checkpoint(tmp_path, tensors, {"quant_method": method})


def test_a_vector_of_fp4_codes_is_refused(tmp_path: Path) -> None:
    tensors = {WEIGHT: torch.zeros(64, dtype=torch.uint8), f"{WEIGHT}_scale": torch.ones(8).to(torch.float8_e4m3fn)}
    tensors[f"{WEIGHT}_scale_2"] = torch.ones(())
    with pytest.raises(CheckpointError, match="is no matrix"):
        checkpoint(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def test_a_second_scale_of_a_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{WEIGHT}_scale .*another scale"):
        checkpoint(tmp_path, FP8 | {f"{WEIGHT}_scale": scales(1)}, {"quant_method": "fp8"})


def test_codes_of_torchao_that_no_header_describes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    fields = {"block_size": [1, 16], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    said = {"_type": "Int8Tensor", "_data": fields, "_tensor_data_names": ["qdata", "scale"]}
    tensors = {}
    for module in (MODULE, f"{MODULE}2"):
        tensors |= {
            f"{module}._weight_qdata": torch.ones(8, 16, dtype=torch.int8),
            f"{module}._weight_scale": scales(8, 1),
        }
    save_file(tensors, tmp_path / "model.safetensors", {WEIGHT: json.dumps(said)})
    with pytest.raises(CheckpointError, match=f"{MODULE}2._weight_qdata .*does not describe"):
        open_checkpoint(tmp_path)
