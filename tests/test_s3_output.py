"""Results at s3:// and fsspec's other URLs: the same bytes, all or nothing, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

from s3_tools import S3Server

from fossil_export import merge

RECORD = "fossil_export.json"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at(server: S3Server, prefix: str) -> dict[str, bytes]:
    found = server.objects("models", f"{prefix}/")
    return {key.removeprefix(f"{prefix}/"): content for key, content in found.items()}


def test_same(s3: S3Server, parts: Path, tmp_path: Path) -> None:
    result = merge(parts / "qv", "s3://models/merged", base=parts / "base", hash=True)
    print(*s3.requests, sep="\n")
    merge(parts / "qv", tmp_path / "merged", base=parts / "base", hash=True)
    assert result.output == "s3://models/merged"
    here, there = files_of(tmp_path / "merged"), at(s3, "merged")
    a, b = json.loads(here.pop(RECORD)), json.loads(there.pop(RECORD))
    assert here == there
    print({k for k in a if a[k] != b[k]})
