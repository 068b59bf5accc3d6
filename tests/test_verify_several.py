"""Merges of several adapters, or of one at a weight, are verified against PEFT with all of them active."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter, make_base
from peft import LoraConfig
from several_tools import trained
from verify_tools import as_bone, flip, tamper

from fossil_export import FossilExportError, merge, verify
from fossil_export.merging._change import Change
from fossil_export.verifying._rebuilding import Addend, rebuild

Array = np.ndarray[Any, Any]
Q0 = "model.layers.0.self_attn.q_proj.weight"
LORA: dict[str, Any] = {"kind": LoraConfig}
KINDS: dict[str, list[dict[str, Any]]] = {
    "lora": [LORA, LORA | {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}],
    "lora of embeddings": [LORA | {"target_modules": ["embed_tokens", "q_proj"]}, LORA],
    "lora and tile": [LORA, {"r": 7}],
    "tile": [{"r": 7}, {"r": 4, "target_modules": ["q_proj"]}],
    "tile, lora, mini": [{}, LORA, {"init_weights": "mini", "mini_r": 8}],
    "lora and a saved head": [LORA | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}],
    "a saved head and lora": [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, LORA],
}


def made(folder: Path, kinds: list[dict[str, Any]], dtype: torch.dtype) -> list[Path]:
    base = make_base(folder / "base", dtype)
    return [trained(folder / f"adapter{n}", base, n, **kind) for n, kind in enumerate(kinds)]


def scales_of(kinds: list[dict[str, Any]]) -> list[float]:
    return [1.0 if "modules_to_save" in kind else weight for kind, weight in zip(kinds, [0.7, -1.5, 2.0], strict=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(KINDS))
def test_every_tensor_is_checked_with_all_adapters(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = made(tmp_path, KINDS[name], dtype)
    merge(adapters, tmp_path / "merged", weights=scales_of(KINDS[name]))
    found = verify(tmp_path / "merged", level="weights")
    assert found.parity and len(found.added.adapters) == len(adapters), found.problems
    tamper(tmp_path / "merged", Q0, lambda old: old + 3 * torch.finfo(old.dtype).eps * old.abs().max())
    assert [line.split()[0] for line in verify(tmp_path / "merged", level="weights").problems] == [Q0]


@pytest.mark.parametrize("name", ["lora", "lora and tile", "tile, lora, mini", "a saved head and lora"])
def test_peft_runs_all_of_them_active_and_scaled(name: str, tmp_path: Path) -> None:
    adapters = made(tmp_path, KINDS[name], torch.float32)
    scales = scales_of(KINDS[name])
    merge(adapters, tmp_path / "merged", weights=scales)
    prompts = tmp_path / "prompts"
    prompts.write_text("one\ntwo\n")
    found = verify(tmp_path / "merged", level="forward", prompts=prompts)
    assert found.parity and found.forward is not None, found.problems
    assert found.forward.artifact.relative_error < 1e-5 and found.forward.truth_dtype == "float64"
    # The same model with a weight told wrongly is another one.
    wrong = [(path, scale * 1.2 if scale != 1 else scale) for path, scale in zip(adapters, scales, strict=True)]
    assert not verify(tmp_path / "merged", level="forward", adapter=wrong, prompts=prompts).parity


@pytest.mark.parametrize(
    "kinds",
    [
        [LORA, {"init_weights": "bat", "r": 8}],
        [{"init_weights": "bat", "r": 8}, LORA],
        [{"init_weights": "bat"}, {"init_weights": "bat", "r": 4}],
        [{}, {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 8}],
    ],
    ids=["lora, bat", "bat, lora", "bat, bat", "tile, bat, mini"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_depends_on_the_weight_sees_those_before_it(
    kinds: list[dict[str, Any]], dtype: torch.dtype, tmp_path: Path
) -> None:
    adapters = made(tmp_path, kinds, dtype)
    merge(adapters, tmp_path / "merged")
    found = verify(tmp_path / "merged", level="all" if dtype == torch.float32 and kinds[0] is LORA else "weights")
    assert found.parity, found.problems
    # In another order it is another model.
    assert not verify(tmp_path / "merged", adapter=adapters[::-1], level="weights").parity
    tamper(tmp_path / "merged", Q0, flip if dtype == torch.bfloat16 else lambda old: old * (1 + 2.0**-12))
    assert not verify(tmp_path / "merged", level="weights").parity


def summed(
    weight: Array, *given: tuple[str, dict[str, Array], dict[str, Any], float]
) -> tuple[Array, Array, Array | float]:
    """The weight with updates (method, tensors, numbers, weight) as the merge has it, and as the check, with the bound
    on what float32 may differ."""
    from fossil_export.adapters import Trained
    from fossil_export.checkpoints._header import TensorInfo
    from fossil_export.checkpoints.layouts._plain import Plain
    from fossil_export.merging._engine import NumpyEngine, Update, merge_slab

    updates, addends = [], []
    for method, arrays, numbers, times in given:
        info = TensorInfo("w", "F32", weight.shape, Path(), 0, weight.nbytes)
        change = Change(0, Trained("m", method, {}, numbers), Plain(info), times)
        updates.append(Update(change.method, arrays, numbers, times))
        addends.append(Addend(change, {role: a.astype(np.float64) for role, a in arrays.items()}, numbers))
    found, exact = np.empty_like(weight), np.empty(weight.shape)
    merge_slab(NumpyEngine(), weight, found, updates, 0, len(weight))
    bound = rebuild(addends, weight.astype(np.float64), exact, wide=False)
    return found, exact, np.abs(exact) * 2.0**-24 * (1 + 2.0**-9) + (0 if bound is None else bound)


def test_the_bound_holds_for_any_sum() -> None:
    """float32's own sums, of random updates at random weights in random order, never leave it."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        out, width, rank = 16, 24, int(rng.choice([2, 4, 8]))
        weight = rng.standard_normal((out, width)).astype(np.float32)
        given = []
        for _ in range(int(rng.integers(1, 4))):
            method = str(rng.choice(["lora", "tile", "bat", "ia3"]))
            shapes = {
                "lora": {"A": (rank, width), "B": (out, rank)},
                "tile": {"D": (rank, out)},
                "bat": {"B": (out // rank, rank, rank)},
                "ia3": {"l": (out, 1)},
            }[method]
            arrays = {role: rng.standard_normal(shape).astype(np.float32) for role, shape in shapes.items()}
            numbers = {"r": rank} | ({"scale": float(rng.standard_normal())} if method == "lora" else {})
            times = 1.0 if method in ("bat", "ia3") else float(rng.standard_normal() * 3)
            given.append((method, arrays, numbers, times))
        found, exact, allowed = summed(weight, *given)
        assert (np.abs(found - exact) <= allowed).all()


def test_errors_that_add_up_in_the_next_update_are_allowed() -> None:
    """A LoRA leaves nothing of the weight but what rounding made of it, and bat takes differences of that."""
    rng = np.random.default_rng(0)
    down = np.sign(rng.standard_normal((16, 24))).astype(np.float32)
    up = rng.standard_normal((16, 16)).astype(np.float32)
    weight = -(up.astype(np.float64) @ down).astype(np.float32)
    differences = np.tile(np.array([[1000, 1000], [-1000, -1000]], np.float32), (8, 1, 1))
    lora = ("lora", {"A": down, "B": up}, {"r": 16, "scale": 1.0}, 1.0)
    found, exact, allowed = summed(weight, lora, ("bat", {"B": differences}, {"r": 2}, 1.0))
    assert (np.abs(found - exact) <= allowed).all()


def test_one_adapter_at_a_weight(tmp_path: Path) -> None:
    (adapter,) = made(tmp_path, [LORA], torch.float32)
    merge((adapter, 0.5), tmp_path / "merged")
    found = verify(tmp_path / "merged", level="weights")
    assert found.parity and found.added.weights == (0.5,) and "at weight 0.5" in found.compared_with
    assert verify(tmp_path / "merged", adapter=adapter, level="weights").parity  # the record has the weight
    assert not verify(tmp_path / "merged", adapter=(adapter, 1.0), level="weights").parity
    assert verify(tmp_path / "merged", level="weights").parity
    certificate = json.loads((tmp_path / "merged" / "fossil_parity.json").read_text())
    assert certificate["adapter"]["weight"] == 0.5


def test_the_verdict_names_every_adapter(tmp_path: Path) -> None:
    adapters = made(tmp_path, [LORA, {}], torch.float32)
    merge(list(zip(adapters, [1.0, 0.5], strict=True)), tmp_path / "merged")
    found = verify(tmp_path / "merged", level="weights", report=tmp_path / "report.html")
    certificate = json.loads((tmp_path / "merged" / "fossil_parity.json").read_text())
    assert [(entry["variant"], entry["weight"]) for entry in certificate["adapters"]] == [("lora", 1.0), ("tile", 0.5)]
    hashes = certificate["hashes"]
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [adapter / name for adapter in adapters for name in names]
    assert "adapter" not in certificate and hashes["adapter"] == [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files
    ]
    for kind, folder in (("base", "base"), ("artifact", "merged")):
        sizes = {path.name: path.stat().st_size for path in (tmp_path / folder).glob("*.safetensors")}
        assert {one["file"]: one["size"] for one in hashes[kind]} == sizes
    assert found.compared_with == "the 2 adapters together, at weights 1, 0.5, on the base as it is stored"
    assert "adapter1 (tile, rank 8, at weight 0.5)" in (tmp_path / "report.html").read_text()


def test_what_does_not_name_the_adapters_of_the_record(tmp_path: Path) -> None:
    adapters = made(tmp_path, [LORA, {}], torch.float32)
    merge(adapters, tmp_path / "merged")
    with pytest.raises(FossilExportError, match=r"was merged from 2 adapters, and 1 are named; name all of them"):
        verify(tmp_path / "merged", adapter=adapters[0], level="weights")
    other = trained(tmp_path / "other", tmp_path / "base", 5)
    problems = verify(tmp_path / "merged", adapter=[adapters[0], other], level="weights").problems
    assert problems[0].startswith(f"the artifact was made from another adapter than {other}: its record differs")
    record = tmp_path / "merged" / "fossil_export.json"
    for weight in ("much", float("nan"), None):
        entries = json.loads(record.read_text())["adapters"]
        entries[1]["weight"] = weight
        edit_json(record, adapters=entries)
        with pytest.raises(FossilExportError, match=r"fossil_export\.json: is damaged"):
            verify(tmp_path / "merged", level="weights")
    record.unlink()
    assert verify(tmp_path / "merged", adapter=adapters, base=tmp_path / "base", level="weights").parity


def test_two_bone_adapters_are_run_by_the_reference_layers(tmp_path: Path) -> None:
    adapters = made(tmp_path, [{}, {"r": 4}], torch.float32)
    for adapter in adapters:
        as_bone(adapter)
    merge(adapters, tmp_path / "merged", weights=[0.5, 2])
    assert verify(tmp_path / "merged").parity


def test_lora_of_conv1d_is_run_by_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=80, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    make_adapter(tmp_path / "adapter", tmp_path / "base", kind=LoraConfig, **targets)
    merge(tmp_path / "adapter", tmp_path / "merged")
    monkeypatch.setattr("fossil_export.verifying._layers.attach", None)
    found = verify(tmp_path / "merged")
    assert found.parity and found.forward is not None and found.forward.artifact.relative_error < 1e-5
