"""Files of PyTorch's that were made to hurt: they end in one line, soon and in little memory."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils import serialization

from fossil_export.adapters._pickled import read_pickled
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints.pickled import parse_pickle_header
from fossil_export.errors import AdapterError, CheckpointError

STORAGE = b"ctorch\nFloatStorage\n"
DOUBLED = b"()q\x00" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(40))
DOUBLED += b"1h\x28"  # a pair of pairs of pairs …, 2^40 of them
DEEP = b")" + b"\x85" * 100_000
ORDERED = b"ccollections\nOrderedDict\n"
PAIR = b"(X\x01\0\0\0aNt"


def tensor(kind: bytes = STORAGE, shape: bytes = b"K\x02K\x03\x86", strides: bytes = b"K\x03K\x01\x86") -> bytes:
    storage = b"(X\x07\0\0\0storage" + kind + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + strides + b"\x89" + ORDERED + b")RtR"


def state(value: bytes, name: bytes = b"a") -> bytes:
    return b"\x80\x02}(X" + struct.pack("<I", len(name)) + name + value + b"u."


def write(path: Path, pickle: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/data/0", bytes(24))
        archive.writestr("archive/version", b"3\n")
    return path


def from_type(kind: bytes) -> bytes:
    return b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\n" + kind + b")}tR"


LONG = b"J\xff\xff\xff\x7f"
BAD = {
    "a deep class": state(tensor(DEEP)),
    "a doubled class": state(tensor(DOUBLED)),
    "a doubled type": state(from_type(DOUBLED)),
    "a doubled shape": state(tensor(shape=DOUBLED)),
    "parameters in parameters": state(b"ctorch._utils\n_rebuild_parameter\n(" * 9999 + tensor() + b"\x89NtR" * 9999),
    "more axes than PyTorch has": state(tensor(shape=b"(" + b"K\x01" * 99 + b"t", strides=b"(" + b"K\x01" * 99 + b"t")),
    "a size of 2000 bits": state(tensor(shape=b"\x8a\xff" + b"\x7f" * 255 + b"\x85", strides=b"K\0\x85")),
    "one list of pairs many times": b"\x80\x02(" + PAIR * 999 + b"lq\0" + (b"0" + ORDERED + b"h\0\x85R") * 9999 + b".",
    "a pair of thousands": b"\x80\x02(" + b"N" * 9999 + b"lq\x010" + ORDERED + b"((" + b"h\1" * 9999 + b"ltR.",
    "millions of dicts": b"\x80\x02" + b"}" * 5_100_000 + b".",
    "hooks that are a storage": state(tensor().replace(ORDERED, STORAGE)),
    "hooks of a parameter": state(b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88K\x01tR"),
    "a gradient that is nothing": state(tensor().replace(b"\x89" + ORDERED, b"N" + ORDERED)),
    "a name for safetensors' own use": state(tensor(), b"__metadata__"),
    "a very long name": state(tensor(), b"x" * 100_000),
    "a very long function": state(b"c" + b"x" * 100_000 + b"\nrun\n)R"),
    "a function that colours": state(b"c\x1b[31mos\nrun\n)R"),
    "a storage that colours": state(tensor().replace(b"X\x01\0\0\x000", b"X\x05\0\0\0\x1b[31m")),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_pickle_that_is_made_to_hurt_is_one_short_line(kind: str, tmp_path: Path) -> None:
    assert list(open_checkpoint(write(tmp_path / "good.bin", state(tensor()))).tensors) == ["a"]
    file = write(tmp_path / "model.bin", BAD[kind])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file)
    message = str(caught.value).removeprefix(str(file))
    assert ";" in message and message.isprintable() and len(message) < 400


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")]
)
def test_what_a_fetch_left_behind_is_told(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 16), (1 << 31, 1 << 31)])
def test_a_value_is_not_repeated_until_memory_is_full(shape: tuple[int, int], tmp_path: Path) -> None:
    few = {"few": torch.zeros(1).expand(64, 64)}
    for state_dict, error in ((few, None), (few | {"many": torch.zeros(1).expand(shape)}, CheckpointError)):
        torch.save(state_dict, tmp_path / "model.bin")
        torch.save(state_dict, tmp_path / "adapter_model.bin")
        if error is None:
            assert read_pickled(tmp_path / "adapter_model.bin")[1]["few"].shape == (64, 64)
            open_checkpoint(tmp_path / "model.bin")
        else:
            with pytest.raises(error, match="repeat values"):
                open_checkpoint(tmp_path / "model.bin")
            with pytest.raises(AdapterError, match="repeat values"):
                read_pickled(tmp_path / "adapter_model.bin")


def test_a_compressed_pickle_is_not_inflated(tmp_path: Path) -> None:
    file = write(tmp_path / "model.bin", b"\x80\x02" + b"}" * 20_000_000, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"has archive/data\.pkl compressed"):
        open_checkpoint(file)


def test_a_list_of_entries_is_not_read_if_it_is_too_long(tmp_path: Path) -> None:
    file, count = tmp_path / "model.bin", 40_000_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, count, 30, 0)
    with file.open("wb") as out:
        out.write(b"PK\x03\x04" + bytes(26))
        out.seek(30 + count)  # a hole
        out.write(end)
    with pytest.raises(CheckpointError, match="has a list of entries of 40,000,000 bytes"):
        open_checkpoint(file)


def test_another_alignment_of_storages_is_not_taken_for_the_usual_one(tmp_path: Path) -> None:
    before = serialization.config.save.storage_alignment
    serialization.config.save.storage_alignment = 16
    try:
        torch.save({f"t{n}": torch.randn(n + 1, 7) for n in range(20)}, tmp_path / "saved.pt")
    finally:
        serialization.config.save.storage_alignment = before
    content = (tmp_path / "saved.pt").read_bytes()
    near, far = (
        parse_pickle_header(tmp_path / "saved.pt", io.BytesIO(content), len(content), far=far) for far in (False, True)
    )
    assert far.tensors == near.tensors
    assert any(one.offset is not None and one.offset % 64 == 48 for one in near.tensors)


def test_a_file_that_others_packed_again_is_read_where_its_bytes_are_from_afar_too(tmp_path: Path) -> None:
    torch.save({f"t{n}": torch.randn(n + 1, 7) for n in range(20)}, tmp_path / "saved.pt")
    for more in range(0, 64, 4):
        out = io.BytesIO()
        with zipfile.ZipFile(tmp_path / "saved.pt") as saved, zipfile.ZipFile(out, "w") as packed:
            for old in saved.infolist():
                new = zipfile.ZipInfo(old.filename.replace("saved", "s" * (more + 1)))
                new.extra = b"UT\x09\0" + bytes(9) + b"ux\x0b\0" + bytes(11)  # as Info-ZIP writes them
                packed.writestr(new, saved.read(old))
        file, size = tmp_path / "packed.pt", len(out.getvalue())
        near, far = (parse_pickle_header(file, io.BytesIO(out.getvalue()), size, far=far) for far in (False, True))
        assert far.tensors == near.tensors
