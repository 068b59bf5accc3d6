"""A file in pieces arrives as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import carry
import pytest

PIECES = ["wheel.whl.000", "wheel.whl.001", "wheel.whl.002"]


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    (tmp_path / "wheel.whl").write_bytes(bytes(range(256)) * 10)
    assert carry.main(["split", str(tmp_path / "wheel.whl"), str(tmp_path / "pieces"), "--pieces-of", "1KB"]) == 0
    return tmp_path / "pieces"


def test_pieces_are_small_and_make_up_the_file(pieces: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in pieces.iterdir()) == [carry.LIST, *PIECES]
    assert [(pieces / name).stat().st_size for name in PIECES] == [1000, 1000, 560]
    (tmp_path / "there").mkdir()
    assert carry.main(["join", str(pieces), str(tmp_path / "there")]) == 0
    assert carry.main(["join", str(pieces), str(tmp_path / "renamed")]) == 0
    for arrived in (tmp_path / "there" / "wheel.whl", tmp_path / "renamed"):
        assert arrived.read_bytes() == (tmp_path / "wheel.whl").read_bytes()


@pytest.mark.parametrize("size", [0, 999, 1000, 1001, (1 << 20) + 1])
def test_every_size_comes_back(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    found = carry.split(tmp_path / "file", tmp_path / "pieces", max(1000, size // 3))
    assert all(path.is_file() for path in found)
    assert carry.join(tmp_path / "pieces", tmp_path / "back").read_bytes() == b"x" * size


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        (PIECES[1], damage, "damaged: wheel.whl.001"),
        (PIECES[2], shorten, "damaged: wheel.whl.002"),
        (PIECES[0], Path.unlink, "missing: wheel.whl.000"),
        (carry.LIST, Path.unlink, "carry.json: is missing"),
        (carry.LIST, lambda path: path.write_text("{}"), "carry.json: is damaged"),
    ],
)
def test_what_did_not_arrive_is_named_and_nothing_is_written(
    name: str, harm: object, words: str, pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(harm)
    harm(pieces / name)
    there = tmp_path / "there"
    there.mkdir()
    assert carry.main(["join", str(pieces), str(there)]) == 1
    assert words in capsys.readouterr().err
    assert list(there.iterdir()) == []


def test_pieces_in_the_wrong_order_are_refused(pieces: Path, tmp_path: Path) -> None:
    record = json.loads((pieces / carry.LIST).read_text())
    record["pieces"].reverse()
    (pieces / carry.LIST).write_text(json.dumps(record))
    with pytest.raises(carry.CarryError, match="do not make up the file"):
        carry.join(pieces, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_list_that_points_elsewhere_is_refused(pieces: Path, tmp_path: Path) -> None:
    record = json.loads((pieces / carry.LIST).read_text())
    (pieces / carry.LIST).write_text(json.dumps(record | {"name": "../outside"}))
    with pytest.raises(carry.CarryError, match="damaged"):
        carry.join(pieces, tmp_path)


def test_old_pieces_are_not_mixed_with_new_ones(pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(carry.CarryError, match="not empty"):
        carry.split(tmp_path / "wheel.whl", pieces, 1000)


@pytest.mark.parametrize(("text", "size"), [("60MB", 60_000_000), ("57MiB", 57 << 20), ("1000", 1000), ("2 kb", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert carry.size_of(text) == size


@pytest.mark.parametrize("text", ["", "0MB", "60 apples", "-1", "1.5MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Exception, match="is no size"):
        carry.size_of(text)
