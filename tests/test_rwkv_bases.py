"""Bases and adapters of RWKV-PEFT: one `.pth` file each, no config."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fossil_export
from fossil_export.adapters._rwkv import is_state_dict
from fossil_export.errors import FossilExportError

State = dict[str, torch.Tensor]
WIDTH, HIDDEN = 32, 48


def base_state() -> State:
    """A few of the tensors of a small RWKV-7, by their names."""
    torch.manual_seed(3)
    state: State = {"emb.weight": torch.randn(20, WIDTH)}
    for at in range(2):
        for name in ("receptance", "key", "value", "output"):
            state[f"blocks.{at}.att.{name}.weight"] = torch.randn(WIDTH, WIDTH)
        state[f"blocks.{at}.att.x_r"] = torch.randn(1, 1, WIDTH)
        state[f"blocks.{at}.ffn.key.weight"] = torch.randn(HIDDEN, WIDTH)
        state[f"blocks.{at}.ffn.value.weight"] = torch.randn(WIDTH, HIDDEN)
    state["head.weight"] = torch.randn(20, WIDTH)
    return {name: value.bfloat16() for name, value in state.items()}


def tile(weight: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """W'[o, j] = W[o, j] + D[j mod r, o]"""
    columns = torch.arange(weight.shape[1]) % shard.shape[0]
    return (weight.float() + shard.float()[columns].T).bfloat16()


def bat(weight: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """W'[b, a] = W[b, a] + W[b, a] B[b] + B[b]"""
    rank = shard.shape[1]
    merged = weight.float().clone()
    for b in range(weight.shape[0] // rank):
        for a in range(weight.shape[1] // rank):
            at = slice(b * rank, (b + 1) * rank), slice(a * rank, (a + 1) * rank)
            merged[at] += weight.float()[at] @ shard[b].float() + shard[b].float()
    return merged.bfloat16()


def adapter_state(base: State) -> State:
    """Tile and bat in one file, of two ranks: the dimensions decide."""
    state = {}
    for name, weight in base.items():
        if ".att." in name and weight.ndim == 2:
            state[name.replace(".weight", ".disha")] = 0.1 * torch.randn(8, len(weight))
        if ".ffn." in name:
            state[name.replace(".weight", ".disha")] = 0.1 * torch.randn(len(weight) // 16, 16, 16)
    return state


@pytest.mark.parametrize("zipped", [True, False])
def test_a_base_and_an_adapter_of_one_file_each(zipped: bool, tmp_path: Path) -> None:
    base = base_state()
    given = tmp_path / "given"
    given.mkdir()
    adapter = adapter_state(base)
    torch.save(base, given / "rwkv-7.pth", _use_new_zipfile_serialization=zipped)
    torch.save(adapter, given / "trained.pth", _use_new_zipfile_serialization=zipped)
    result = fossil_export.merge(given / "trained.pth", tmp_path / "merged", base=given / "rwkv-7.pth")
    assert {"model.safetensors", "fossil_export.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}
    assert not list((tmp_path / "merged").glob("*.pth"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys() and len(result.survival) == len(adapter)
    for name, weight in base.items():
        shard = adapter.get(name.replace(".weight", ".disha"))
        if shard is None:
            assert torch.equal(merged[name], weight), name
        elif shard.ndim == 2:
            assert torch.equal(merged[name], tile(weight, shard)), name
        else:  # sums in another order
            torch.testing.assert_close(merged[name], bat(weight, shard), rtol=2**-7, atol=2**-7)
    verdict = fossil_export.verify(
        tmp_path / "merged",
        adapter=given / "trained.pth",
        base=given / "rwkv-7.pth",
        level="weights",
    )
    assert verdict.parity, verdict.problems
    assert "tile+bat" in repr(fossil_export.load_adapter(given / "trained.pth"))


def test_a_peft_folder_over_a_file_of_rwkv(tmp_path: Path) -> None:
    base = base_state()
    given = tmp_path / "given"
    given.mkdir()
    torch.save(base, given / "rwkv-7.pth")
    shards = {name: value for name, value in adapter_state(base).items() if value.ndim == 2}
    torch.save(shards, given / "trained.pth")
    fossil_export.convert(given / "trained.pth", tmp_path / "miss", to="miss", base=str(given / "rwkv-7.pth"))
    for name, adapter in (("of_file", given / "trained.pth"), ("of_folder", tmp_path / "miss")):
        fossil_export.merge(adapter, tmp_path / name, base=given / "rwkv-7.pth")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("of_folder", "of_file"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_mixture_has_no_form_in_peft(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    torch.save(adapter_state(base_state()), given / "trained.pth")
    with pytest.raises(FossilExportError, match=r"is a tile\+bat adapter, of which PEFT's MISS has no form"):
        fossil_export.convert(given / "trained.pth", tmp_path / "miss", to="miss")


@pytest.mark.parametrize("value", [torch.zeros(4, WIDTH, dtype=torch.int32), torch.zeros(4, 0), torch.zeros(0, WIDTH)])
def test_a_shard_of_whole_numbers_or_of_nothing_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"blocks.0.att.key.disha": value}, tmp_path / "trained.pth")
    words = (
        rf"trained.pth: tensor blocks.0.att.key.disha \[{value.shape[0]}, {value.shape[1]}\] is .* or empty, no shard"
    )
    with pytest.raises(FossilExportError, match=words):
        fossil_export.load_adapter(tmp_path / "trained.pth")


def test_a_file_that_holds_more_than_shards_or_none_is_refused(tmp_path: Path) -> None:
    shard = {"blocks.0.att.key.disha": torch.ones(4, WIDTH)}
    for state, words in (
        (shard | {"blocks.0.att.x_r": torch.ones(WIDTH)}, "holds blocks.0.att.x_r, which are no shards"),
        ({}, "is not a state dict"),
    ):
        torch.save(state, tmp_path / "trained.pth")
        with pytest.raises(FossilExportError, match=words):
            fossil_export.load_adapter(tmp_path / "trained.pth")


def test_a_file_beside_a_config_of_pefts_is_not_read_as_one_of_rwkvs(tmp_path: Path) -> None:
    torch.save({"blocks.0.att.key.disha": torch.ones(4, WIDTH)}, tmp_path / "trained.pth")
    assert is_state_dict(tmp_path / "trained.pth") and not is_state_dict(tmp_path)
    shutil.copyfile(tmp_path / "trained.pth", tmp_path / "trained.bin")
    assert not is_state_dict(tmp_path / "trained.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not is_state_dict(tmp_path / "trained.pth")
