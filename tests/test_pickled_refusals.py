"""Files of `torch.save` that are damaged or no state dict: one line, and nothing of them runs."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickled_bases import values_of

from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError


class Runs:
    """Leaves a file behind if it is unpickled by a careless loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


ONE = torch.ones(2, 3)
BAD: dict[str, tuple[Any, list[str]]] = {
    "code": (lambda path: {"a": ONE, "b": Runs(path)}, ["'b'", "system", "run"]),
    "nothing but code": (Runs, ["system", "run"]),
    "code in a list": (lambda path: [Runs(path)], ["not a state dict"]),
    "a list": (lambda path: [ONE], ["not a state dict"]),
    "nothing": (lambda path: {}, ["not a state dict"]),
    "one tensor": (lambda path: ONE, ["is one tensor"]),
    "a module": (lambda path: torch.nn.Linear(2, 2), ["Linear", "model.state_dict()"]),
    "a checkpoint of Lightning": (lambda path: {"epoch": 1, "state_dict": {"a": ONE}}, ["under 'state_dict'"]),
    "two models": (lambda path: {"ema": {"a": ONE}, "model": {"a": ONE}}, ["under 'model'"]),
    "a number": (lambda path: {"a": ONE, "step": 3}, ["'step' is no tensor but int"]),
    "a sparse tensor": (lambda path: {"a": torch.eye(3).to_sparse()}, ["'a' is not a plain tensor"]),
    "a quantized tensor": (
        lambda path: {"a": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)},
        ["'a' is not a plain tensor"],
    ),
    "complex128": (lambda path: {"a": ONE.to(torch.complex128)}, ["'a'", "ComplexDoubleStorage"]),
    "a conjugate": (lambda path: {"a": ONE.to(torch.complex64).conj()}, ["'a' is a conjugate"]),
    "strided booleans": (lambda path: {"a": (ONE > 0).T}, ["'a'", ".contiguous()"]),
    "a key that is a number": (lambda path: {3: ONE}, ["key 3"]),
    "a key that is a tuple": (lambda path: {(3,): ONE}, ["no state dict"]),
    "a name that is no text": (lambda path: {"\ud800": ONE}, ["as PyTorch never does"]),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_state_dict_is_refused_and_nothing_of_it_runs(kind: str, zipped: bool, tmp_path: Path) -> None:
    make, words = BAD[kind]
    file = tmp_path / "weights.bin"
    torch.save(make(tmp_path / "ran"), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message and ";" in message and len(message) < 400
    for word in words:
        assert word in message
    assert not (tmp_path / "ran").exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(str(tmp_path / "model.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        open_checkpoint(tmp_path / "model.pt")


def rewritten(path: Path, **changes: Any) -> None:
    """Write a zip archive again, with entries (by the ends of their names) changed, or compressed."""
    compression = changes.pop("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as old:
        contents = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in contents.items():
            found = changes.get(name.rpartition("/")[2].replace(".", "_"), content)
            if found is not None:
                new.writestr(name, found)


def test_archives_that_are_not_pytorchs(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(64)}, file)
    rewritten(file)  # another writer, which aligns nothing
    assert values_of(open_checkpoint(file), "a").tolist() == [1.0] * 64
    for changes, words in (
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed or encrypted"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data_pkl": None}, "none that PyTorch writes"),
        ({"0": b"1234"}, "has 4 bytes in storage 0, not 256"),
        ({"0": None}, "lacks its storage '0'"),
        ({"version": None}, "has no weights/version"),
        ({"data_pkl": b"\x80\x02\x85."}, "no sound pickle"),
        ({"data_pkl": b"\x80\x02}P."}, "opcode"),
    ):
        torch.save({"a": torch.ones(64)}, file)
        rewritten(file, **changes)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(file)


def test_an_archive_without_sums_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(64)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.load(file)["a"].tolist() == [1.0] * 64
    assert values_of(open_checkpoint(file), "a").tolist() == [1.0] * 64


def test_an_archive_with_something_beside_it_or_with_two_sizes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(64)}, file)
    whole = file.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"weights/data/0"))
    two_sizes = whole[: entry + 20] + b"\x01\2\0\0" + whole[entry + 24 :]
    for content, words in (
        (whole + b"x", "after its last"),
        (whole + whole, "before its first entry"),
        (b"PK\x03\x04" + whole, "before its first entry"),
        (two_sizes, "with two sizes"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(file)
    file.write_bytes(whole)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data/0", b"x")
    with pytest.raises(CheckpointError, match="'other/data/0' outside of weights/"):
        open_checkpoint(file)


def test_a_big_endian_file_of_old(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    raw = file.read_bytes()
    at = raw.index(b"little_endian")
    found = raw.index(b"\x88", at)  # True
    file.write_bytes(raw[:found] + b"\x89" + raw[found + 1 :])
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_told_in_one_line(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(40), "b": torch.ones(3, 3).T}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(0, len(whole), 29):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(file)
    random = np.random.default_rng(0)
    for _ in range(400):  # told, or read: never another exception
        at, value = int(random.integers(len(whole))), int(random.integers(256))
        file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            open_checkpoint(file)
        except CheckpointError as problem:
            assert "\n" not in str(problem)


def test_a_storage_that_is_too_short_for_its_tensor(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(300)}, file, _use_new_zipfile_serialization=False)
    raw = file.read_bytes()
    size = struct.pack("<H", 300)
    at = raw.rindex(size, 0, raw.rindex(b"]"))  # the size of the tensor, not of its storage
    file.write_bytes(raw[:at] + struct.pack("<H", 301) + raw[at + 2 :])
    with pytest.raises(CheckpointError, match="'a' reaches past the end of its storage"):
        open_checkpoint(file)


def test_a_pickle_that_asks_for_memory_gets_none(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(3)}, file)
    rewritten(file, data_pkl=b"\x80\x02}r\xff\xff\xff\x7f.")  # a place in the memo that CPython makes room for
    with pytest.raises(CheckpointError, match="not a state dict"):
        open_checkpoint(file)
    rewritten(file, data_pkl=b"\x80\x02" + b")\x85" * 100_000 + b"\x85" * 500_000 + b".")
    with pytest.raises(CheckpointError):
        open_checkpoint(file)
