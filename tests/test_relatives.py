"""LoRA's relatives, as their own code saves them: what is exact is merged, all else is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from fossil_export import inspect, load_adapter, merge, verify
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 96)}
R, ALPHA = 6, 15


def write(folder: Path, base: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder as the forks of PEFT 0.3 write it: a pickle, and a config with their fields."""
    folder.mkdir(exist_ok=True)
    torch.save({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.bin")
    written = {
        "base_model_name_or_path": str(base), "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": R, "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return folder


def sbora(kind: str) -> dict[str, torch.Tensor]:
    """What `Linear.__init__` of SBoRA makes, trained."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, (outputs, inputs) in SHAPES.items():
        if kind == "fa":
            found[f"{name}.lora_A"] = torch.randperm(inputs, generator=generator)[:R]
            found[f"{name}.lora_B.weight"] = torch.randn(outputs, R, generator=generator)
        else:
            found[f"{name}.lora_A.weight"] = torch.randn(R, inputs, generator=generator)
            found[f"{name}.lora_B"] = torch.randperm(outputs, generator=generator)[:R]
    return found


def sbora_weight(name: str, weight: torch.Tensor, found: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The answers of SBoRA's forward pass to the unit vectors, in float64."""
    x = torch.eye(weight.shape[1], dtype=torch.float64)[None]
    result = x @ weight.double().T
    if kind == "fa":
        result += x[:, :, found[f"{name}.lora_A"]] @ found[f"{name}.lora_B.weight"].double().T * (ALPHA / R)
    else:
        result.index_add_(2, found[f"{name}.lora_B"], x @ found[f"{name}.lora_A.weight"].double().T * (ALPHA / R))
    return result[0].T


@pytest.mark.parametrize("kind", ["fa", "fb"])
@pytest.mark.parametrize("peft_type", ["SBORA", "LORA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sbora_is_merged_to_what_its_forward_pass_gives(
    kind: str, peft_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, found = make_base(tmp_path / "base", dtype), sbora(kind)
    own = {"adapter_name": f"sbora_{kind}"} if peft_type == "SBORA" else {}
    merge(write(tmp_path / "sbora", base, found, peft_type=peft_type, **own), tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    for name, value in after.items():
        module = name.removesuffix(".weight")
        if module not in SHAPES:
            assert torch.equal(value, before[name])
            continue
        wanted = sbora_weight(module, before[name], found, kind)
        assert torch.allclose(value.double(), wanted, rtol=1e-6 if dtype == torch.float32 else 2.0**-8, atol=1e-6)
        assert not torch.equal(value, before[name])
    assert verify(tmp_path / "merged", level="weights").parity


def test_sbora_as_safetensors_is_the_same(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "sbora", base, sbora("fa"), peft_type="SBORA")
    merge(folder, tmp_path / "one")
    (folder / "adapter_model.bin").unlink()
    save_file(
        {f"base_model.model.{name}": value for name, value in sbora("fa").items()}, folder / "adapter_model.safetensors"
    )
    merge(folder, tmp_path / "two")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert inspect(folder).to_dict()["dtypes"] == {"I64": 2, "float32": 2}


def test_sboras_numbers_outside_of_the_weight_are_refused(base: Path, tmp_path: Path) -> None:
    for kind, name, place in (("fa", "lora_A", 48), ("fa", "lora_A", -1), ("fb", "lora_B", -1)):
        found = sbora(kind)
        found[f"model.layers.0.self_attn.q_proj.{name}"][2] = place
        with pytest.raises(AdapterError, match="has numbers from"):
            merge(write(tmp_path / "sbora", base, found, peft_type="SBORA"), tmp_path / "merged")


@pytest.mark.parametrize("missing", ["lora_A", "lora_B.weight"])
def test_half_of_an_sbora_is_refused(missing: str, base: Path, tmp_path: Path) -> None:
    found = sbora("fa")
    del found[f"model.layers.0.self_attn.q_proj.{missing}"]
    for peft_type in ("SBORA", "LORA"):
        with pytest.raises(AdapterError, match="missing"):
            load_adapter(write(tmp_path / "sbora", base, found, peft_type=peft_type))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 8), st.booleans(),
    st.sampled_from([0.3, 1.0, -2.0]),
)  # fmt: skip
def test_sbora_for_any_rows_in_numpy_and_torch(
    outputs: int, inputs: int, rank: int, fa: bool, start: int, as_torch: bool, scale: float
) -> None:
    start %= outputs
    random = np.random.default_rng(outputs * 91 + inputs * 10 + rank)
    weight = random.standard_normal((outputs, inputs)).astype(np.float32)
    places = random.integers(0, inputs if fa else outputs, rank)  # the same one may come twice
    values = random.standard_normal((outputs, rank) if fa else (rank, inputs)).astype(np.float32)
    arrays = {"columns": places, "B": values} if fa else {"rows": places, "A": values}
    wanted = weight.astype(np.float64)
    for k, place in enumerate(places):
        if fa:
            wanted[:, place] += scale * values[:, k].astype(np.float64)
        else:
            wanted[place] += scale * values[k].astype(np.float64)
    numbers = {"r": rank, "scale": scale}
    part: Any = METHODS["sbora"].part(arrays, start, outputs)
    rows: Any = weight[start:].copy()
    if as_torch:
        rows, part = torch.from_numpy(rows), {role: torch.from_numpy(np.array(value)) for role, value in part.items()}
    METHODS["sbora"].add(rows, part, numbers, 0)
    assert np.allclose(np.asarray(rows), wanted[start:], atol=1e-5)
    exact = np.empty((outputs - start, inputs))
    wide = {role: value.astype(np.float64) for role, value in arrays.items()}
    bound = EXACT["sbora"].rebuild(
        weight[start:].astype(np.float64), EXACT["sbora"].part(wide, start, outputs), numbers, exact
    )
    assert np.allclose(exact, wanted[start:], rtol=1e-12, atol=1e-12)
    assert (
        bound is not None and (np.abs(np.asarray(rows, np.float64) - exact) <= bound + np.abs(exact) * 2.0**-24).all()
    )


def pruned() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    found = {}
    for name, (outputs, inputs) in SHAPES.items():
        found[f"{name}.lora_A.weight"] = torch.randn(R, inputs, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(outputs, R, generator=generator)
        found[f"{name}.lora_mask"] = (torch.rand(outputs, generator=generator) > 0.4).float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loraprune_is_merged_with_its_mask(dtype: torch.dtype, tmp_path: Path) -> None:
    base, found = make_base(tmp_path / "base", dtype), pruned()
    merge(write(tmp_path / "pruned", base, found), tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    for module in SHAPES:
        weight = before[f"{module}.weight"].double()
        x = torch.eye(weight.shape[1], dtype=torch.float64)[None]
        down, up = found[f"{module}.lora_A.weight"].double(), found[f"{module}.lora_B.weight"].double()
        result = (x @ weight.T + (x @ down.T) @ up.T * (ALPHA / R)) * found[f"{module}.lora_mask"].reshape(1, 1, -1)
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
        assert torch.allclose(after[f"{module}.weight"].double(), result[0].T, rtol=tolerance, atol=1e-5)
        assert 0 < (after[f"{module}.weight"].abs().sum(1) == 0).sum() < len(weight)
    assert verify(tmp_path / "merged", level="weights").parity
    file = next(file for file in (tmp_path / "merged").glob("*.safetensors") if _has(file, "layers.1.mlp.down_proj"))
    tensors = {name: value for name, value in after.items() if _has(file, name)}
    row = int(found["model.layers.1.mlp.down_proj.lora_mask"].argmin())
    tensors["model.layers.1.mlp.down_proj.weight"][row, 7] = 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert not verify(tmp_path / "merged", level="weights").parity


def _has(file: Path, name: str) -> bool:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return any(name in key for key in opened.keys())  # noqa: SIM118


def test_loraprune_on_a_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=90,
        num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=r"q_proj\.bias is masked too"):
        merge(write(tmp_path / "pruned", tmp_path / "base", pruned()), tmp_path / "merged")


def test_a_mask_of_another_length_is_refused(base: Path, tmp_path: Path) -> None:
    found = pruned() | {"model.layers.0.self_attn.q_proj.lora_mask": torch.ones(47)}
    with pytest.raises(AdapterError, match="mask does not go with"):
        load_adapter(write(tmp_path / "pruned", base, found))


MANY = {
    f"{name}.{half}.{number}.weight": torch.ones((2, inputs) if half == "lora_A" else (outputs, 2))
    for name, (outputs, inputs) in SHAPES.items() for half in ("lora_A", "lora_B") for number in range(3)
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
LORA = {f"{name}.{half}.weight": torch.ones((R, inputs) if half == "lora_A" else (outputs, R))
        for name, (outputs, inputs) in SHAPES.items() for half in ("lora_A", "lora_B")}  # fmt: skip


@pytest.mark.parametrize(
    "tensors, config, why",
    [
        (MANY, {"peft_type": "GOAT", "num_experts": 3, "top_k": 2, "init_type": "goat"}, "for each token"),
        (MANY, {"peft_type": "COLA", "num_A": 3, "num_B": 3}, "less a part of its singular values"),
        (MANY, {"peft_type": "HYDRALORA"}, "for each token"),
        (LORA, {"peft_type": "BOTTLENECK"}, "not linear"),
        # The same under LoRA's name.
        (MANY, {}, "several matrices"),
        (LORA | {f"{Q}.lora_gating.weight": torch.ones(3, 48)}, {}, "for each token"),
        (LORA | {f"{Q}.moe_layer.gate.weight": torch.ones(3, 48)}, {}, "for each token"),
        (LORA | {f"{Q}.lora_route.weight": torch.ones(3, 48)}, {}, "for each token"),
        (LORA, {"num_experts": 3}, "several experts"),
        (LORA, {"num_A": 2}, "several experts"),
        (LORA | {f"{Q}.adapter_down.weight": torch.ones(3, 48)}, {}, "on what layers give"),
        (LORA | {f"{Q}.loras.0.lora_A": torch.ones(3, 48)}, {}, "branches of other layers"),
        (LORA | {f"{Q}.something": torch.ones(3)}, {}, "does not know how to merge"),
        (LORA, {"enable_lora": [True, False, True]}, "parts of a fused weight"),
        ({name: value.long() for name, value in LORA.items()}, {}, "is I64"),
    ],
)
def test_what_is_no_lora_is_not_merged_as_one(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], why: str, base: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "other", base, tensors, **config)
    with pytest.raises(AdapterError, match=why):
        load_adapter(folder)
    write(tmp_path / "other", base, LORA)
    assert len(load_adapter(folder).trained) == 2  # without it, it is one


def test_reslora_is_told_by_its_files(tmp_path: Path) -> None:
    for name in ("reslora_config.json", "pytorch_model_lora.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(AdapterError, match="ResLoRA's"):
        load_adapter(tmp_path)


def test_the_fields_of_lora_forks_change_nothing(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "plain", base, kind=LoraConfig, target_modules=["q_proj"])
    merge(tmp_path / "plain", tmp_path / "one")
    edit_json(tmp_path / "plain" / "adapter_config.json", merge_weights=True, enable_lora=None)
    merge(tmp_path / "plain", tmp_path / "two")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
