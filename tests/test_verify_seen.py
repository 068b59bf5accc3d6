"""`verify` runs its trainer on what a quantized or oddly stored base stands for."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_adapter, make_base, weights
from quantized_bases import adapter_for, fp8_folder
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from verify_tools import flip, tamper

from fossil_export import convert, merge, verify
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import FossilExportError
from fossil_export.verifying._prompts import PROMPTS
from fossil_export.verifying._seen import plain_base


@pytest.fixture(autouse=True)
def two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell models apart that differ in a module."""
    monkeypatch.setattr("fossil_export.verifying._verification.PROMPTS", PROMPTS[:2])


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """An fp8 base and an adapter of it, as tmp_path/quantized, tmp_path/dequantized and tmp_path/adapter."""
    _, dequantized = fp8_folder(tmp_path)
    adapter_for(dequantized, tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_a_merge_into_fp8_is_run_beside_the_dequantized_base(fp8: Path, temporary: Path) -> None:
    merge(fp8 / "adapter", fp8 / "merged", base=fp8 / "quantized")
    found = verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "quantized")
    plain = verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "dequantized", level="forward")
    assert found.parity and found.forward is not None and plain.forward is not None
    assert found.forward.trainer == plain.forward.trainer and found.forward.artifact == plain.forward.artifact
    assert list(temporary.iterdir()) == []


def test_a_wrong_merge_into_fp8_is_seen_by_its_answers(fp8: Path) -> None:
    merge(fp8 / "adapter", fp8 / "merged", base=fp8 / "quantized")
    tamper(fp8 / "merged", "model.layers.1.mlp.up_proj.weight", lambda old: old * 3)
    found = verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "quantized", level="forward")
    assert not found.parity and found.forward is not None
    assert found.forward.first_outside == "model.layers.1.mlp.up_proj"


def test_a_lora_is_run_beside_the_dequantized_base(fp8: Path) -> None:
    convert(fp8 / "adapter", fp8 / "lora", to="lora", base=fp8 / "quantized")
    for level in ("all", "forward"):
        found = verify(fp8 / "lora", adapter=fp8 / "adapter", base=fp8 / "quantized", level=level)  # type: ignore[arg-type]
        assert found.parity and found.forward is not None, found.problems


@pytest.mark.parametrize("size", [None, "40KB"])
def test_the_copy_is_what_transformers_dequantizes(
    size: str | None, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is not None:
        monkeypatch.setattr("fossil_export.merging._onto.FILES_OF", size)
    (fp8 / "quantized" / "tokenizer.json").write_text("{}")
    with plain_base(open_checkpoint(fp8 / "quantized")) as plain:
        assert plain.folder is not None and (plain.index is not None) == (size is not None)
        found, wanted = weights(plain.folder), weights(fp8 / "dequantized")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert json.loads((plain.folder / "config.json").read_text()) == json.loads(
            (fp8 / "dequantized" / "config.json").read_text()
        )
        assert (plain.folder / "tokenizer.json").read_text() == "{}"
        loaded = LlamaForCausalLM.from_pretrained(plain.folder, dtype="auto").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    assert not plain.folder.exists()


def test_a_plain_base_is_not_copied(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path / "base"))
    with plain_base(base) as plain:
        assert plain is base


def test_the_file_that_is_named_is_the_one_that_runs(tmp_path: Path) -> None:
    """Of two sets of weights in a folder transformers would load the one with the usual name."""
    base = make_base(tmp_path / "base", shards="1GB")
    make_adapter(tmp_path / "adapter", base)
    other = {name: value * 2 for name, value in load_file(base / "model.safetensors").items()}
    save_file(other, base / "other.safetensors", {"format": "pt"})
    named = base / "other.safetensors"
    merge(tmp_path / "adapter", tmp_path / "merged", base=named, max_shard_size="1GB")
    found = verify(tmp_path / "merged", adapter=tmp_path / "adapter", base=named)
    assert found.parity and found.forward is not None, found.problems


def test_a_disk_that_is_too_small_is_told_at_once(fp8: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(fp8 / "adapter", fp8 / "merged", base=fp8 / "quantized")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, 1 << 20, 1000))
    with pytest.raises(FossilExportError, match=r"quantized: is run as plain weights, which take .* set TMPDIR"):
        verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "quantized", level="forward")
    assert list(temporary.iterdir()) == []


def test_the_room_for_the_copy_is_that_of_its_weights_and_the_files_beside_them(
    fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fp8 / "quantized" / "tokenizer.json").write_bytes(b" " * 1_000_000)
    base = open_checkpoint(fp8 / "quantized")
    with plain_base(base) as plain:
        assert plain.folder is not None
        files = [*plain.folder.glob("*.safetensors"), *(fp8 / "quantized").glob("*.json")]
        needed = sum(path.stat().st_size for path in files)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 20, needed))
    with plain_base(base) as plain:
        assert plain is not base
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 20, needed - 1))
    with pytest.raises(FossilExportError, match=f"take {needed:,} bytes, .* has {needed - 1:,} free"), plain_base(base):
        pass


def test_what_is_wrong_with_the_base_is_told_by_its_own_path(fp8: Path) -> None:
    with pytest.raises(FossilExportError) as error, plain_base(open_checkpoint(fp8 / "quantized")) as plain:
        raise FossilExportError(f"{plain.location}: no")
    assert str(error.value) == f"{fp8 / 'quantized'}: no"


def test_one_bit_of_a_weight_is_seen(fp8: Path) -> None:
    merge(fp8 / "adapter", fp8 / "merged", base=fp8 / "quantized")
    tamper(fp8 / "merged", "model.layers.1.mlp.up_proj.weight", flip)
    found = verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "quantized", level="weights")
    assert len(found.problems) == 1 and "up_proj.weight 1 of" in found.problems[0]


def test_a_model_that_was_quantized_again_is_run_as_what_it_stands_for(fp8: Path) -> None:
    """It is not the trained model, and its numbers say how far it is."""
    merge(fp8 / "adapter", fp8 / "merged", base=fp8 / "quantized")
    (fp8 / "again").mkdir()
    again, _ = fp8_folder(fp8 / "again", base=fp8 / "merged")
    found = verify(again, adapter=fp8 / "adapter", base=fp8 / "quantized", level="forward")
    assert found.forward is not None and not found.parity
    assert found.forward.trainer.relative_error < found.forward.artifact.relative_error < 0.2
    exact = verify(fp8 / "merged", adapter=fp8 / "adapter", base=fp8 / "quantized", level="forward")
    assert exact.forward is not None and exact.forward.trainer == found.forward.trainer
