"""Verification catches what it must, and names where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verify_tools
from conftest import edit_json, make_adapter, make_base, weights
from safetensors.torch import load_file, save_file
from verify_tools import Q0, Q1, UP1, flip, remerged, tamper, tiled

from fossil_export import FossilExportError, merge, verify

bf16 = verify_tools.bf16
NORM = "model.norm.weight"


def without_remainder(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    whole = weight.shape[1] // 7 * 7
    return torch.cat([(weight + update)[:, :whole], weight[:, whole:]], 1)


def swapped_layers(folder: Path) -> None:
    remerged(folder, Q0, lambda weight, update: weight + tiled(folder, Q1, weight.shape[1]))


def other_base(folder: Path) -> None:
    """The same shapes, other values in one untouched tensor; the record is that of the right base."""
    tamper(folder, "model.embed_tokens.weight", lambda old: old * 1.01)


MUST_CATCH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit, merged": (lambda f: tamper(f, f"{UP1}.weight", flip), f"{UP1}.weight 1 of "),
    "flipped bit, untouched": (lambda f: tamper(f, NORM, flip), f"{NORM} 1 of "),
    "transposed": (lambda f: remerged(f, Q0, lambda w, d: w + d.T), f"{Q0}.weight"),
    "twice": (lambda f: remerged(f, Q1, lambda w, d: w + 2 * d), f"{Q1}.weight"),
    "not at all": (lambda f: remerged(f, Q1, lambda w, d: w), f"{Q1}.weight"),
    "wrong layer": (swapped_layers, f"{Q0}.weight"),
    "without the remainder": (lambda f: remerged(f, UP1, without_remainder), f"{UP1}.weight"),
    "re-typed": (lambda f: tamper(f, NORM, lambda old: old.float()), f"{NORM} is stored as F32, should be BF16"),
    "reshaped": (lambda f: tamper(f, NORM, lambda old: old[:-1]), f"{NORM} has shape [47]"),
    "missing": (lambda f: tamper(f, NORM, lambda old: None), f"{NORM} is missing"),
    "NaN": (lambda f: tamper(f, f"{Q0}.weight", lambda old: old * float("nan")), f"{Q0}.weight"),
    "another base": (other_base, "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", MUST_CATCH)
def test_weights_level_catches_and_names(name: str, bf16: Path) -> None:
    assert verify(bf16, level="weights").parity
    damage, reason = MUST_CATCH[name]
    damage(bf16)
    result = verify(bf16, level="weights")
    assert not result.parity and len(result.problems) == 1, result.problems
    assert result.problems[0].startswith(reason)
    assert json.loads((bf16 / "fossil_parity.json").read_text())["reason"] == result.problems[0]


@pytest.mark.parametrize(("before", "after"), [("float32", "float16"), ("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_cast_power_of_two_one_step_towards_zero(sign: int, before: str, after: str, tmp_path: Path) -> None:
    """Below a power of two the steps are half as long as above."""
    base = make_base(tmp_path / "base", getattr(torch, before))
    tamper(base, NORM, lambda old: old * sign)
    make_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=after)
    assert verify(tmp_path / "merged", level="weights").parity
    bits = torch.int32 if after == "float32" else torch.int16
    tamper(tmp_path / "merged", NORM, lambda old: (old.view(bits) - 1).view(old.dtype))
    result = verify(tmp_path / "merged", level="weights")
    assert not result.parity and result.problems[0].startswith(f"{NORM} 48 of 48 elements"), result.problems


def test_extra_tensor(bf16: Path) -> None:
    path = next(bf16.glob("*-00001-*.safetensors"))
    save_file({**load_file(path), "extra.weight": torch.zeros(3)}, path, {"format": "pt"})
    index = json.loads((bf16 / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = path.name
    (bf16 / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(bf16, level="weights").problems[0].startswith("extra.weight is in the artifact")


def test_bat_merged_as_tile(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, r=8, init_weights="bat")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").parity
    blocks = weights(tmp_path / "adapter")[f"base_model.model.{Q1}.miss_block"]
    wrong = weights(base)[f"{Q1}.weight"].float() + blocks.reshape(-1, 8).repeat(1, 6)
    tamper(tmp_path / "merged", f"{Q1}.weight", lambda old: wrong.to(old.dtype))
    problem = verify(tmp_path / "merged", level="weights").problems[0]
    assert problem.startswith(f"{Q1}.weight")
    merge(tmp_path / "adapter", tmp_path / "again")
    tamper(tmp_path / "again", f"{Q1}.weight", flip)
    assert verify(tmp_path / "again", level="weights").problems[0].startswith(f"{Q1}.weight 1 of ")


def test_broken_ties(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged").parity
    edit_json(tmp_path / "merged" / "config.json", tie_word_embeddings=True)
    result = verify(tmp_path / "merged")
    assert "ties tensors that training parted" in result.problems[0]
    edit_json(tmp_path / "merged" / "config.json", tie_word_embeddings=False, vocab_size=119)
    assert any("vocab_size 119" in problem for problem in verify(tmp_path / "merged", level="weights").problems)
    edit_json(tmp_path / "merged" / "config.json", vocab_size=None)
    assert any("another vocab_size" in problem for problem in verify(tmp_path / "merged", level="weights").problems)
    tamper(tmp_path / "merged", "lm_head.weight", lambda old: None)
    problems = verify(tmp_path / "merged", level="weights").problems
    assert "lm_head.weight is missing from the artifact" in problems


def test_config_that_does_not_describe_the_tensors(bf16: Path) -> None:
    config = (bf16 / "config.json").read_bytes()
    for changes, reason in (
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"hidden_size": {}}, "hidden_size"),
        ({"tie_word_embeddings": True}, "says tie_word_embeddings True"),
    ):
        edit_json(bf16 / "config.json", **changes)
        assert reason in verify(bf16, level="weights").problems[0]
        (bf16 / "config.json").write_bytes(config)
    (bf16 / "pytorch_model.bin").write_bytes(b"stale")
    assert verify(bf16, level="weights").problems == (
        "pytorch_model.bin holds other weights, which a loader may take instead; remove it",
    )
    (bf16 / "pytorch_model.bin").unlink()
    (bf16 / "config.json").unlink()
    assert "config.json is missing" in verify(bf16, level="weights").problems[0]


def test_odd_dtypes_and_values_of_the_base(tmp_path: Path) -> None:
    """Infinities of the base's own, elements of less than a byte, float64 shards: no wolf, and nothing missed."""
    base = make_base(tmp_path / "base", shards="1GB")
    path = base / "model.safetensors"
    state = load_file(path)
    state["model.mask"] = torch.tensor([0.0, float("-inf"), float("nan")])
    save_file(state, path, {"format": "pt"})
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    shards = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value.double() + 1e-12 for name, value in load_file(shards).items()}, shards)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["model.tiny"] = {"dtype": "F4", "shape": [7, 10], "data_offsets": [end, end + 35]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(range(35)))
    for dtype in ("auto", "float16"):
        merge(tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        result = verify(tmp_path / dtype, level="weights")
        assert result.parity, result.problems
    damaged = bytearray((tmp_path / "auto" / "model.safetensors").read_bytes())
    damaged[-1] ^= 0x10
    (tmp_path / "auto" / "model.safetensors").write_bytes(damaged)
    assert verify(tmp_path / "auto", level="weights").problems[0].startswith("model.tiny 1 of 70 elements")
    tamper_mask = bytearray((tmp_path / "float16" / "model.safetensors").read_bytes())
    place = tamper_mask.index(np.array([0, -np.inf, np.nan], np.float16).tobytes())
    tamper_mask[place + 2 : place + 4] = np.float16(3).tobytes()
    (tmp_path / "float16" / "model.safetensors").write_bytes(tamper_mask)
    assert verify(tmp_path / "float16", level="weights").problems[0].startswith("model.mask 1 of 3 elements")


def test_damaged_record(bf16: Path) -> None:
    record = (bf16 / "fossil_export.json").read_text()
    for changes in (
        {"dtype": "foo"},
        {"adapter": "x"},
        {"base": {"name": "b", "weights": [{}]}},
        {"base": {"name": "b", "weights": [{"size": 1, "header_sha256": "x", "file": [5]}]}},
    ):
        edit_json(bf16 / "fossil_export.json", **changes)
        with pytest.raises(FossilExportError, match="is damaged"):
            verify(bf16, level="weights")
        (bf16 / "fossil_export.json").write_text(record)
    edit_json(bf16 / "fossil_export.json", tensors=5)  # of these nothing is used
    assert verify(bf16, level="weights").parity


def test_artifact_of_another_base_or_adapter_by_its_record(bf16: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", torch.bfloat16, shards="60KB")
    problems = verify(bf16, base=tmp_path / "other", level="weights").problems
    assert problems[0].startswith("the artifact was made from another base")
    make_adapter(tmp_path / "second", tmp_path / "base", r=7, target_modules=["q_proj"])
    problems = verify(bf16, adapter=tmp_path / "second", level="weights").problems
    assert problems[0].startswith("the artifact was made from another adapter")
    make_adapter(
        tmp_path / "wide", make_base(tmp_path / "same"), r=4, target_modules=["q_proj"], layers_to_transform=[1]
    )
    state = {name.replace("layers.1", "layers.9"): value for name, value in weights(tmp_path / "wide").items()}
    save_file(state, tmp_path / "wide" / "adapter_model.safetensors")
    edit_json(tmp_path / "wide" / "adapter_config.json", layers_to_transform=[9])
    assert "layers.9" in verify(bf16, adapter=tmp_path / "wide").problems[0]


@pytest.mark.parametrize("module", [Q0, UP1])
def test_forward_level_localises(module: str, bf16: Path) -> None:
    assert verify(bf16, level="forward").parity
    remerged(bf16, module, lambda weight, update: weight + 3 * update)
    result = verify(bf16, level="forward")
    assert result.forward is not None and result.forward.first_outside == module
    assert f"first at module {module}" in result.problems[0]
    assert result.to_dict()["forward"]["first_module_outside"] == module


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": {}}, {"pad_token_id": 10**9}, {"eos_token_id": [None, "x"]}, {"use_cache": "no"},
        {"dtype": "x"},
        {"attention_bias": True}, {"max_position_embeddings": 1}, {"attention_dropout": None}, {"auto_map": {}},
        {"initializer_range": "x"}, {"vocab_size": "64"}, {"attention_multiplier": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_a_merge_would_not_write_is_no_parity(changes: dict[str, Any], bf16: Path) -> None:
    edit_json(bf16 / "config.json", **changes)
    problems = verify(bf16, level="weights").problems
    assert len(problems) == 1 and "config.json" in problems[0] and next(iter(changes)) in problems[0], problems
