"""Carry a file that is larger than one transfer may be: in pieces, whose SHA-256 are checked where they arrive.

    python benchmarks/carry.py split WHEEL.whl build/pieces --pieces-of 60MB
    python benchmarks/carry.py join build/pieces build/

`split` writes the pieces and, beside them, a list of their digests (carry.json), which travels with them. `join`
writes the file, under its own name where the target is a folder, once every piece is there and sound; what is missing
or damaged is named, and nothing is written. Needs Python's standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIST = "carry.json"
CHUNK = 1 << 20
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CarryError(Exception):
    """One line that says what is wrong and what helps."""


def split(file: Path, folder: Path, size: int) -> list[Path]:
    """Write `file` into `folder` in pieces of at most `size` bytes; returns them and the list of their digests."""
    if folder.exists() and any(folder.iterdir()):
        raise CarryError(f"{folder}: is not empty; remove it, or name another folder")
    total = file.stat().st_size
    folder.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    pieces: list[dict[str, Any]] = []
    with file.open("rb") as source:
        for number in range(max(1, -(-total // size))):
            digest, path = hashlib.sha256(), folder / f"{file.name}.{number:03}"
            with path.open("wb") as piece:
                for data in _chunks(source, size):
                    piece.write(data)
                    digest.update(data)
                    whole.update(data)
            pieces.append({"name": path.name, "size": path.stat().st_size, "sha256": digest.hexdigest()})
    if sum(piece["size"] for piece in pieces) != total:
        raise CarryError(f"{file}: changed while it was read; split it again")
    record = {"name": file.name, "size": total, "sha256": whole.hexdigest(), "pieces": pieces}
    (folder / LIST).write_text(json.dumps(record, indent=2) + "\n")
    return [*(folder / piece["name"] for piece in pieces), folder / LIST]


def join(folder: Path, target: Path) -> Path:
    """Put the pieces in `folder` together as `target`, or within it where it is a folder; returns the file."""
    record = _read(folder / LIST)
    missing = [piece["name"] for piece in record["pieces"] if not (folder / piece["name"]).is_file()]
    if missing:
        raise CarryError(f"{folder}: missing: {', '.join(missing)}; copy them, too")
    damaged = [piece["name"] for piece in record["pieces"] if _digest(folder / piece["name"]) != piece["sha256"]]
    if damaged:
        raise CarryError(f"{folder}: damaged: {', '.join(damaged)}; copy them again")
    file = target / record["name"] if target.is_dir() else target
    part = file.with_name(f".{file.name}.{os.getpid()}")
    whole = hashlib.sha256()
    try:
        with part.open("wb") as out:
            for piece in record["pieces"]:
                with (folder / piece["name"]).open("rb") as source:
                    for data in _chunks(source, piece["size"]):
                        out.write(data)
                        whole.update(data)
        if whole.hexdigest() != record["sha256"]:
            raise CarryError(f"{folder / LIST}: its pieces do not make up the file; split it again")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def size_of(text: str) -> int:
    """Bytes from a number with or without a unit: 60MB, 60MiB, 60000000."""
    found = re.fullmatch(r"([0-9]+) *([KMG]I?B)?", text.upper())
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 60MB or 57MiB")
    return int(found[1]) * UNITS[found[2] or ""]


def _chunks(source: Any, size: int) -> Iterator[bytes]:
    """At most `size` bytes of an open file, a chunk at a time."""
    while size and (data := source.read(min(CHUNK, size))):
        size -= len(data)
        yield data


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        for data in _chunks(source, path.stat().st_size):
            digest.update(data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        names = [record["name"], *(piece["name"] for piece in record["pieces"])]
        sound = all(name == Path(name).name and name not in ("", "..") for name in names)
        for piece in record["pieces"]:
            sound = sound and isinstance(piece["size"], int) and isinstance(piece["sha256"], str)
        if not sound or not isinstance(record["sha256"], str):
            raise ValueError
    except FileNotFoundError as problem:
        raise CarryError(f"{path}: is missing; copy it, too") from problem
    except (ValueError, TypeError, KeyError) as problem:
        raise CarryError(f"{path}: is damaged; copy it again") from problem
    return dict(record)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="a file into pieces")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("folder", type=Path, help="new or empty")
    splitting.add_argument("--pieces-of", type=size_of, default=size_of("60MB"), metavar="SIZE", help="default 60MB")
    joining = commands.add_parser("join", help="pieces into the file")
    joining.add_argument("folder", type=Path)
    joining.add_argument("target", type=Path, help="a file, or a folder for it")
    options = parser.parse_args(argv)
    try:
        if options.command == "split":
            for path in split(options.file, options.folder, options.pieces_of):
                print(f"{path} {path.stat().st_size}")
        else:
            print(join(options.folder, options.target))
    except (CarryError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
