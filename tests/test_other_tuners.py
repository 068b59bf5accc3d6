"""The smaller methods of PEFT are merged as its live models have them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_adapter, make_base, weights
from method_tools import judge, noise
from safetensors.torch import load_file, save_file

from fossil_export import load_adapter, merge, plan_merge, verify
from fossil_export.errors import AdapterError, MergeError
from fossil_export.merging._engine import NumpyEngine, TorchEngine
from fossil_export.methods import METHODS
from fossil_export.onnx._trained import merged_rows
from fossil_export.onnx.graph._match import Piece

WEIGHTS = "adapter_model.safetensors"

CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "HiRA": (peft.HiraConfig, True, {}),
    "HiRA with ranks": (peft.HiraConfig, True, {"rank_pattern": {"q_proj": 3}}),
    "C3A": (peft.C3AConfig, False, {"block_size": 24}),
    "C3A with sizes": (peft.C3AConfig, False, {"block_size": 12, "block_size_pattern": {"q_proj": 48}}),
    "DeLoRA": (peft.DeloraConfig, False, {}),
    "DeLoRA with ranks": (peft.DeloraConfig, False, {"rank_pattern": {"q_proj": 3}, "lambda_pattern": {"q_proj": 2}}),
    "GraLoRA": (peft.GraloraConfig, False, {"r": 8, "gralora_k": 4, "alpha": 5}),
    "GraLoRA with a LoRA": (peft.GraloraConfig, False, {"r": 6, "gralora_k": 2, "hybrid_r": 3}),
    "RandLoRA": (peft.RandLoraConfig, True, {"r": 7, "randlora_alpha": 11}),
    "sparse RandLoRA": (peft.RandLoraConfig, True, {"r": 8, "randlora_alpha": 16, "sparse": True}),
    "DEFT": (peft.DeftConfig, False, {"r": 4}),
    "DEFT, orthogonal": (peft.DeftConfig, False, {"r": 4, "decomposition_method": "qr", "alpha": 3}),
    "DEFT that only takes away": (peft.DeftConfig, False, {"r": 4, "para": True}),
    "SHiRA": (peft.ShiraConfig, True, {"r": 2}),
    "Supertuning": (peft.SupertuningConfig, True, {"sparsity": 0.9, "r": None}),
    "Supertuning with a LoRA": (peft.SupertuningConfig, False, {"sparsity": 0.9, "r": 3}),
    "Uni-LoRA": (peft.UniLoraConfig, True, {"r": 5, "save_indices": True}),
    "VB-LoRA": (peft.VBLoRAConfig, False, {"r": 4, "num_vectors": 10, "vector_length": 12, "topk": 3}),
    "VB-LoRA with one vector each": (peft.VBLoRAConfig, False, {"num_vectors": 10, "vector_length": 8, "topk": 1}),
    "VB-LoRA cut": (
        peft.VBLoRAConfig, False, {"num_vectors": 10, "vector_length": 12, "save_only_topk_weights": True},
    ),
    "FourierFT": (peft.FourierFTConfig, False, {"n_frequency": 60}),
    "FourierFT with counts": (
        peft.FourierFTConfig, False, {"n_frequency": 9, "random_loc_seed": 5, "n_frequency_pattern": {"q_proj": 200}},
    ),
    "PVeRA": (peft.PveraConfig, True, {"r": 6}),
}  # fmt: skip

HARMLESS = {f"base_model.model.model.layers.0.self_attn.q_proj.randlora_{name}" for name in "AB"}
"""Copies of what the file has once more; it may lack them."""


@pytest.mark.parametrize("name", list(CASES))
def test_it_answers_as_trained(name: str, base: Path, tmp_path: Path) -> None:
    kind, bits, config = CASES[name]
    judge(tmp_path, base, kind, bits=bits, **config)


def test_hira_of_an_embedding_answers_as_trained(base: Path, tmp_path: Path) -> None:
    judge(tmp_path, base, peft.HiraConfig, target_modules=["embed_tokens"], modules=1)


def test_beft_adds_to_the_biases_that_a_model_has(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    judge(tmp_path, tmp_path / "base", peft.BeftConfig, target_modules=["q_proj", "v_proj"])


def test_pvera_that_draws_its_update_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "pvera", base, noise, kind=peft.PveraConfig, sample_at_inference=True)
    with pytest.raises(AdapterError, match="drawn anew in each pass; set it to false"):
        load_adapter(tmp_path / "pvera")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of every case, trained on two kinds of modules."""
    folder = tmp_path_factory.mktemp("tuners")
    base = make_base(folder / "base")
    for name, (kind, _, config) in CASES.items():
        make_adapter(folder / name, base, noise, kind=kind, **{"target_modules": ["q_proj", "down_proj"], **config})
    return folder


def variants(folder: Path, copy: Path) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor]]:
    """Each tensor of the first q_proj and each that is shared, with a copy of the adapter to be damaged in `copy`."""
    shutil.copytree(folder, copy)
    whole = load_file(folder / WEIGHTS)
    for key, value in whole.items():
        if "layers.0.self_attn.q_proj." in key or "layers." not in key:
            yield key, dict(whole), value


@pytest.mark.parametrize("name", list(CASES))
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    own = sum("layers.0.self_attn.q_proj." in key for key in load_file(trained / name / WEIGHTS))
    copy = tmp_path / "copy"
    for key, tensors, value in variants(trained / name, copy):
        for change in ("missing", "row", "column", "one more"):
            damaged = dict(tensors)
            if change == "missing" and (own > 1 or "layers." not in key):
                del damaged[key]
            elif change == "row" and len(value) > 1:
                damaged[key] = value[:-1].clone()
            elif change == "column" and value.ndim > 1 and value.shape[-1] > 1:
                damaged[key] = value[..., :-1].clone()
            elif change == "one more":
                damaged[key] = value[None].clone()
            else:
                continue
            save_file(damaged, copy / WEIGHTS)
            if change == "missing" and key in HARMLESS:
                plan_merge(copy)
                continue
            try:
                plan_merge(copy)
            except (AdapterError, MergeError) as problem:
                assert "\n" not in str(problem) and str(copy) in str(problem), (key, change)
            else:
                raise AssertionError(f"{key}, {change}")


@pytest.mark.parametrize("name", list(CASES))
def test_a_value_that_is_not_a_number_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for key, tensors, value in variants(trained / name, copy):
        if not value.is_floating_point():
            continue
        damaged = value.clone()
        damaged.reshape(-1)[0] = float("nan")
        save_file(tensors | {key: damaged}, copy / WEIGHTS)
        with pytest.raises((AdapterError, MergeError), match=r"infinite or NaN|copy of the shared"):
            merge(copy, tmp_path / "merged")


@pytest.mark.parametrize(
    "name", [name for name in CASES if any(word in name for word in ("SHiRA", "Super", "Uni", "cut"))]
)
@pytest.mark.parametrize("wrong", [-1, 2**20])
def test_a_place_outside_of_what_there_is_is_refused(name: str, wrong: int, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for key, tensors, value in variants(trained / name, copy):
        if value.is_floating_point():
            continue
        damaged = value.to(torch.int32)
        damaged.reshape(-1)[0] = wrong
        save_file(tensors | {key: damaged}, copy / WEIGHTS)
        with pytest.raises(AdapterError, match="are not in its weight"):
            merge(copy, tmp_path / "merged")


@pytest.mark.parametrize("name", list(CASES))
def test_whole_numbers_are_refused_for_trained_values(name: str, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for key, tensors, value in variants(trained / name, copy):
        if value.is_floating_point():
            save_file(tensors | {key: value.to(torch.int32)}, copy / WEIGHTS)
            with pytest.raises(AdapterError, match=r"expected one of F64|no matrix of floats"):
                load_adapter(copy)


def test_shira_takes_the_places_that_windows_saves_as_floats(trained: Path, tmp_path: Path) -> None:
    whole = load_file(trained / "SHiRA" / WEIGHTS)
    shutil.copytree(trained / "SHiRA", tmp_path / "floats")
    save_file(
        {key: value.float() if "indices" in key else value for key, value in whole.items()},
        tmp_path / "floats" / WEIGHTS,
    )
    merge(tmp_path / "floats", tmp_path / "one")
    merge(trained / "SHiRA", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert verify(tmp_path / "one", level="weights").parity


def test_vb_lora_whose_choice_nothing_tells_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "VB-LoRA", tmp_path / "equal")
    whole = load_file(trained / "VB-LoRA" / WEIGHTS)
    whole["base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"][0, 0] = 1.0
    save_file(whole, tmp_path / "equal" / WEIGHTS)
    with pytest.raises(AdapterError, match="two of vblora_logits_A are equal"):
        merge(tmp_path / "equal", tmp_path / "merged")


def test_randlora_whose_copies_differ_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "RandLoRA", tmp_path / "two")
    whole = load_file(trained / "RandLoRA" / WEIGHTS)
    whole["base_model.model.model.layers.0.self_attn.q_proj.randlora_B"][0, 0, 0] += 1
    save_file(whole, tmp_path / "two" / WEIGHTS)
    with pytest.raises(AdapterError, match="randlora_B is no copy of the shared one"):
        merge(tmp_path / "two", tmp_path / "merged")


@pytest.mark.parametrize(
    "kind, why",
    [
        (peft.UniLoraConfig, "save_indices is False, so that the file does not say"),
        (peft.SupertuningConfig, "save_precomputed_indices is False, so that the file does not say"),
        (peft.RandLoraConfig, "save_projection is False, so that the file lacks randlora_A"),
        (peft.PveraConfig, "save_projection is False, so that the file lacks pvera_A"),
    ],
)
def test_what_is_not_in_the_file_is_not_guessed(kind: Any, why: str, base: Path, tmp_path: Path) -> None:
    fields = ("save_indices", "save_precomputed_indices", "save_projection")
    config = {name: False for name in fields if name in kind.__dataclass_fields__}
    make_adapter(tmp_path / "adapter", base, noise, kind=kind, target_modules=["q_proj"], **config)
    with pytest.raises(AdapterError, match=why):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", list(CASES))
def test_pytorch_merges_it_to_nearly_the_same(name: str, trained: Path, tmp_path: Path) -> None:
    adapter = load_adapter(trained / name)
    module = next(key for key in adapter.trained if key.endswith("layers.0.mlp.down_proj"))
    one = adapter.trained[module]
    arrays = adapter.arrays(module)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    found = {}
    for engine in (NumpyEngine(), TorchEngine("cpu")):
        wide = {role: engine.widen(array, "I64" if role[0] == "#" else "F32") for role, array in arrays.items()}
        rows = engine.widen(weight.numpy(), "F32")
        METHODS[one.method].add(rows, wide, one.numbers, 0)
        found[type(engine)] = torch.as_tensor(rows)
        assert found[type(engine)].dtype == torch.float32
        engine.close()
    torch.testing.assert_close(*found.values(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[NumpyEngine], weight)


MORE = {"VeRA": (peft.VeraConfig, {"r": 6}), "PEANuT": (peft.PeanutConfig, {"r": 6, "depth": 1})}


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_cut_into_the_smallest_slabs_it_is_nearly_the_same_and_verified(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained / name
    if name in MORE:
        kind, config = MORE[name]
        make_adapter(adapter, trained / "base", noise, kind=kind, target_modules=["q_proj", "down_proj"], **config)
    merge(adapter, tmp_path / "whole")
    monkeypatch.setattr("fossil_export.merging._slabs.SLAB", 1 << 10)
    monkeypatch.setattr("fossil_export.verifying._job.SLAB", 1 << 12)
    monkeypatch.setattr("fossil_export.verifying._job.BLOCK", 1)
    monkeypatch.setattr(NumpyEngine, "block", 1)
    merge(adapter, tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key, value in whole.items():
        torch.testing.assert_close(cut[key], value, rtol=1e-5, atol=1e-6)
    assert verify(tmp_path / "cut", level="weights").parity


@pytest.mark.parametrize("name", ["FourierFT", "SHiRA", "RandLoRA", "DEFT", "C3A"])
def test_rows_of_a_graphs_weight_are_those_of_the_whole(name: str, trained: Path) -> None:
    adapter = load_adapter(trained / name)
    module = next(iter(adapter.trained))
    base = torch.randn(48, 96 if "down" in module else 48).numpy()
    whole = merged_rows(adapter, Piece(module, start=0, at=0, count=48), base)
    assert (merged_rows(adapter, Piece(module, start=5, at=0, count=20), base) == whole[5:25]).all()
