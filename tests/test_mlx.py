"""Adapters of MLX: what its layers compute, written down here in float64, is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_base, peft_merged, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fossil_export import convert, load_adapter, merge, verify
from fossil_export.adapters._mlx import is_mlx
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import METHODS
from fossil_export.verifying.reference import EXACT

SHAPES = {
    "model.layers.0.self_attn.q_proj": (48, 48),
    "model.layers.1.self_attn.v_proj": (24, 48),
    "model.layers.1.mlp.down_proj": (48, 96),
}
EMBEDDING = {"model.embed_tokens": (120, 48)}


def make_mlx(
    folder: Path, base: Path, shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = 4, scale: float = 20.0,
    dora: bool = False, **config: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A folder as `train_model` of mlx_lm/lora.py leaves it; returns its tensors."""
    generator = torch.Generator().manual_seed(rank)
    found: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        first, second = (outputs, inputs) if "embed" in name else (inputs, outputs)
        found[f"{name}.lora_a"] = torch.randn(first, rank, generator=generator) * 0.1
        found[f"{name}.lora_b"] = torch.randn(rank, second, generator=generator) * 0.1
        if dora:
            found[f"{name}.m"] = torch.rand(outputs, generator=generator) + 0.5
    folder.mkdir(parents=True)
    save_file(found, folder / "adapters.safetensors", metadata={"format": "mlx"})
    save_file(found, folder / "0000100_adapters.safetensors")
    written = {
        "model": str(base), "train": True, "fine_tune_type": "dora" if dora else "lora", "optimizer": "adam",
        "optimizer_config": {"adam": {}}, "data": "d", "seed": 0, "num_layers": 16, "batch_size": 4, "iters": 100,
        "val_batches": 25, "learning_rate": 1e-05, "steps_per_report": 10, "steps_per_eval": 200,
        "resume_adapter_file": None, "adapter_path": "adapters", "save_every": 100, "test": False,
        "max_seq_length": 2048, "config": None, "grad_checkpoint": False, "lr_schedule": None, "mask_prompt": True,
        "lora_parameters": {"rank": rank, "dropout": 0.05, "scale": scale},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return found


def mlx_weight(name: str, weight: torch.Tensor, found: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """The weight that MLX's forward pass uses: its answer to the unit vectors, less the bias."""
    first, second, wide = found[f"{name}.lora_a"].double(), found[f"{name}.lora_b"].double(), weight.double()
    if "embed" in name:
        tokens = torch.arange(len(weight))
        changed = wide[tokens] + scale * (first[tokens] @ second)
    else:
        inputs = torch.eye(weight.shape[1], dtype=torch.float64)
        changed = (inputs @ wide.T + scale * ((inputs @ first) @ second)).T
    if f"{name}.m" in found:
        adapted = wide + (scale * (first @ second) if "embed" in name else scale * (second.T @ first.T))
        changed = (found[f"{name}.m"].double() / adapted.square().sum(1).sqrt())[:, None] * changed
    return changed


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_has_the_weights_that_mlx_computes_with(dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    found = make_mlx(tmp_path / "mlx", base, {**SHAPES, **EMBEDDING}, dora=dora)
    merge(tmp_path / "mlx", tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    for name, value in after.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_a" not in found:
            assert torch.equal(value, before[name]), name
            continue
        wanted = mlx_weight(module, before[name], found, 20.0)
        tolerance = 2e-6 if dtype == torch.float32 else 2.0**-8
        assert torch.allclose(value.double(), wanted, rtol=tolerance, atol=2e-6), name
        assert not torch.allclose(before[name].double(), wanted, rtol=0.01), name
    assert verify(tmp_path / "merged", level="weights").parity
    assert {trained.rank for trained in load_adapter(tmp_path / "mlx").trained.values()} == {4}


def test_lora_has_the_bits_of_the_same_lora_in_pefts_form(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    found = make_mlx(tmp_path / "mlx", base, rank=4, scale=2.5)
    model = AutoModelForCausalLM.from_pretrained(base)
    names = list(SHAPES)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=names))
    for name in names:
        module = peft.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data = found[f"{name}.lora_a"].T.contiguous()
        module.lora_B["default"].weight.data = found[f"{name}.lora_b"].T.contiguous()
    peft.save_pretrained(tmp_path / "peft")
    merge(tmp_path / "mlx", tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), peft_merged(base, tmp_path / "peft", torch.float32)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    convert(tmp_path / "mlx", tmp_path / "lora", to="lora", base=base)
    again = peft_merged(base, tmp_path / "lora", torch.float32)
    assert [name for name in ours if not torch.allclose(ours[name], again[name], atol=1e-6)] == []


def test_a_tied_head_follows_its_embedding_as_in_mlx(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    found = make_mlx(tmp_path / "mlx", base, EMBEDDING)
    merge(tmp_path / "mlx", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = mlx_weight("model.embed_tokens", weights(base)["model.embed_tokens.weight"], found, 20.0)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.allclose(module.weight.double(), wanted, atol=1e-5)
    assert verify(tmp_path / "merged", level="weights").parity


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.sampled_from(["lora_mlx", "dora_mlx"]),
    st.booleans(), st.integers(0, 8), st.sampled_from([0.1, 1.0, -3.0, 20.0]), st.booleans(),
)  # fmt: skip
def test_any_rows_in_numpy_and_torch(
    outputs: int, inputs: int, rank: int, kind: str, embedding: bool, start: int, scale: float, as_torch: bool
) -> None:
    start %= outputs
    random = np.random.default_rng(outputs * 100 + inputs * 10 + rank)
    first, second = (outputs, inputs) if embedding else (inputs, outputs)
    arrays: dict[str, Any] = {
        "a": random.standard_normal((first, rank)).astype(np.float32),
        "b": random.standard_normal((rank, second)).astype(np.float32),
    }
    weight = random.standard_normal((outputs, inputs)).astype(np.float32)
    if kind == "dora_mlx":
        arrays["m"] = random.standard_normal(outputs).astype(np.float32)
    name = f"{kind}_embedding" if embedding else kind
    module = "embed_tokens" if embedding else "x"
    found = {f"{module}.lora_{role}".replace("lora_m", "m"): torch.from_numpy(value) for role, value in arrays.items()}
    # MLX's layers are judged by the whole of the weight, of which some rows are taken.
    wanted = mlx_weight(f"{module}", torch.from_numpy(weight), found, scale)[start:].numpy()
    numbers = {"r": rank, "scale": scale}
    part = METHODS[name].part(arrays, start, outputs)
    rows: Any = weight[start:].copy()
    if as_torch:
        rows, part = torch.from_numpy(rows), {role: torch.from_numpy(np.array(value)) for role, value in part.items()}
    update = METHODS[name].update(rows, part, numbers, 0)
    METHODS[name].add(rows, part, numbers, 0)
    size = max(1.0, float(np.abs(wanted).max()))
    assert np.allclose(np.asarray(rows), wanted, atol=2e-5 * size)
    assert np.allclose(np.asarray(update), wanted - weight[start:], atol=2e-5 * size)
    exact = np.empty((outputs - start, inputs))
    wide = {role: value.astype(np.float64) for role, value in arrays.items()}
    bound = EXACT[name].rebuild(
        weight[start:].astype(np.float64), EXACT[name].part(wide, start, outputs), numbers, exact
    )
    assert np.allclose(exact, wanted, rtol=1e-9, atol=1e-9 * size)
    assert (
        bound is not None and (np.abs(np.asarray(rows, np.float64) - exact) <= bound + np.abs(exact) * 2.0**-24).all()
    )


@pytest.mark.parametrize("dora", [False, True])
def test_a_wrong_value_in_the_merge_is_caught(dora: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_mlx(tmp_path / "mlx", base, dora=dora)
    merge(tmp_path / "mlx", tmp_path / "merged")
    for file in (tmp_path / "merged").glob("*.safetensors"):
        tensors = {name: value for name, value in weights(tmp_path / "merged").items() if name in _names(file)}
        name = "model.layers.1.mlp.down_proj.weight"
        if name in tensors:
            tensors[name][3, 5] *= 1 + 1e-5
            save_file(tensors, file, metadata={"format": "pt"})
    found = verify(tmp_path / "merged", level="weights")
    assert not found.parity


def _names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_a_checkpoint_of_the_training_can_be_named(base: Path, tmp_path: Path) -> None:
    make_mlx(tmp_path / "mlx", base)
    merge(tmp_path / "mlx" / "0000100_adapters.safetensors", tmp_path / "one")
    merge(tmp_path / "mlx", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    "config",
    [
        {"fine_tune_type": ..., "num_layers": ..., "lora_layers": 16},
        {
            "lora_parameters": {"rank": 4, "alpha": 4, "scale": 20.0, "dropout": 0.0},
            "num_layers": ...,
            "lora_layers": 8,
        },
        {"lora_parameters": {"rank": 4, "alpha": 16, "scale": 20.0}},
        {
            "lora_parameters": {
                "rank": 4,
                "scale": 20,
                "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
            }
        },
    ],
)
def test_older_configs_and_keys_give_the_same(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    for name in ("plain", "other"):
        make_mlx(tmp_path / name, base)
    edit_json(tmp_path / "other" / "adapter_config.json", **config)
    one, two = load_adapter(tmp_path / "plain"), load_adapter(tmp_path / "other")
    assert [trained.numbers for trained in one.trained.values()] == [
        trained.numbers for trained in two.trained.values()
    ]


@pytest.mark.parametrize(
    "config, why",
    [
        ({"fine_tune_type": "full", "lora_parameters": None}, "mlx_lm.fuse writes the whole model"),
        ({"fine_tune_type": "dora"}, "the tensors are of another kind"),
        ({"fine_tune_type": "prompt"}, "not lora or dora"),
        ({"lora_parameters": {"rank": 5, "scale": 20.0}}, "rank 4, but the config says rank 5"),
        ({"lora_parameters": {"rank": 4}}, "scale is None"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "scale is nan"),
        ({"lora_parameters": {"rank": True, "scale": 1}}, "rank is True"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "gate": 2}}, "lora_parameters.gate"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "keys": ["self_attn.q_proj"]}}, "does not cover"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "alpha": 16}, "num_layers": ..., "lora_layers": 4}, "June 2024"),
        ({"lora_parameters": None}, "has no lora_parameters"),
        ({"reft": True}, "does not understand"),
        ({"model": 3}, "model is 3"),
    ],
)
def test_what_the_config_says_otherwise_is_refused(
    config: dict[str, Any], why: str, base: Path, tmp_path: Path
) -> None:
    make_mlx(tmp_path / "mlx", base)
    edit_json(tmp_path / "mlx" / "adapter_config.json", **config)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "mlx")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model.layers.0.self_attn.q_proj.lora_b": None}, "lora_b is missing"),
        ({"model.layers.0.self_attn.q_proj.lora_b": torch.ones(5, 48)}, "do not go together"),
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(48, 4, 1)}, "do not go together"),
        ({"model.layers.0.self_attn.q_proj.lora_b": torch.ones(4, 48, 1)}, "do not go together"),
        ({"model.layers.0.self_attn.q_proj.m": torch.ones(48)}, "another kind|may be of"),
        ({"model.norm.weight": torch.ones(48)}, "was trained beside it"),
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(48, 4, dtype=torch.int32)}, "is I32"),
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(0, 4)}, "is empty"),
    ],
)
def test_tensors_that_are_no_lora_are_refused(
    change: dict[str, torch.Tensor | None], why: str, base: Path, tmp_path: Path
) -> None:
    tensors = make_mlx(tmp_path / "mlx", base) | change
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "mlx")


def test_nan_and_other_shapes_do_not_pass(base: Path, tmp_path: Path) -> None:
    tensors = make_mlx(tmp_path / "mlx", base)
    tensors["model.layers.0.self_attn.q_proj.lora_a"][1, 1] = float("nan")
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises((AdapterError, MergeError), match="NaN"):
        merge(tmp_path / "mlx", tmp_path / "merged")
    make_mlx(tmp_path / "other", base, {"model.layers.0.self_attn.q_proj": (47, 48)})
    with pytest.raises(MergeError, match="47 outputs, the weight has 48"):
        merge(tmp_path / "other", tmp_path / "merged")


def test_a_base_that_mlx_changes_when_it_loads_it_is_refused(base: Path, tmp_path: Path) -> None:
    make_mlx(tmp_path / "mlx", base)
    edit_json(base / "config.json", model_type="falcon_h1")
    with pytest.raises(MergeError, match="multiplies its weights"):
        merge(tmp_path / "mlx", tmp_path / "merged")


def test_an_older_folder_without_safetensors_says_what_to_do(base: Path, tmp_path: Path) -> None:
    make_mlx(tmp_path / "mlx", base)
    (tmp_path / "mlx" / "adapters.safetensors").rename(tmp_path / "mlx" / "adapters.npz")
    with pytest.raises(AdapterError, match=r"has no adapters\.safetensors"):
        load_adapter(tmp_path / "mlx")


def test_a_file_of_mlx_tells_its_folder() -> None:
    for name in ("adapters.npz", "adapters.safetensors"):
        assert is_mlx({"rank": 4}, [name]) and not is_mlx({"rank": 4, "peft_type": "LORA"}, [name])
    assert not is_mlx({"rank": 4}, ["adapter_model.safetensors"])


def test_mlx_vlms_first_format(base: Path, tmp_path: Path) -> None:
    found = make_mlx(tmp_path / "mlx", base, rank=4, scale=0.5)
    merge(tmp_path / "mlx", tmp_path / "one")
    (tmp_path / "vlm").mkdir()
    renamed = {name.replace("lora_a", "A").replace("lora_b", "B"): value for name, value in found.items()}
    save_file(renamed, tmp_path / "vlm" / "adapters.safetensors")
    (tmp_path / "vlm" / "adapter_config.json").write_text('{"rank": 4, "alpha": 2, "dropout": 0.1}')
    merge(tmp_path / "vlm", tmp_path / "two", base=base)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)
