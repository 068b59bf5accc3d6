"""Xet storage for the loopback Hub: a folder that hf_xet, the Hub client's own library, opens as its local store.

The library chunks, hashes and deduplicates as it does for the real storage service; only the wire between the two is
a folder. Its shards, which name each file's Xet hash and SHA-256, are read here as the Xet specification has them.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PUT = """
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    for path in sys.argv[2:]:
        commit.start_upload_file(path, sha256=hf_xet.COMPUTE_SHA256)
"""
_GET = """
import sys, hf_xet
with hf_xet.XetSession().new_file_download_group(endpoint=sys.argv[1]) as group:
    group.start_download_file(hf_xet.XetFileInfo(sys.argv[2], int(sys.argv[3])), sys.argv[4])
"""
_END = b"\xff" * 32
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30


class XetStore:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.url = f"local://{folder}"
        self.given: set[Path] = set()  # shards of what the Hub itself put there
        self._read: set[Path] = set()
        self._files: dict[str, tuple[str, int]] = {}

    def put(self, *paths: Path) -> None:
        before = self.shards()
        self._run(_PUT, self.url, *map(str, paths))
        self.given |= self.shards() - before

    def get(self, sha256: str, target: Path) -> None:
        xet_hash, size = self.files()[sha256]
        # Two cannot have the store open, and a client may have, which locks its database.
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as temporary:
            inner = Path("xet", "xorbs")
            shutil.copytree(self.folder / inner, temporary / inner, copy_function=_linked)
            self._run(_GET, f"local://{temporary}", xet_hash, str(size), str(target))

    def files(self) -> dict[str, tuple[str, int]]:
        """By SHA-256, the Xet hash and the size of what was uploaded."""
        for path in self.shards() - self._read:
            self._files |= dict(_files(path.read_bytes()))
            self._read.add(path)
        return self._files

    def shards(self) -> set[Path]:
        """The files that tell what was uploaded."""
        return set((self.folder / "xet" / "xorbs" / "shards").glob("*.mdb"))

    def forget(self, *shards: Path) -> None:
        for path in shards:
            path.unlink()
        self._read.clear()
        self._files.clear()

    def of_client(self) -> tuple[Path, Path]:
        """What hf_xet keeps for its client, which with any other store is in that client's home."""
        return self.folder / "xet" / "shard-cache", self.folder / "xet" / "shard-session"

    def xorbs(self) -> list[Path]:
        """The files that hold content."""
        return sorted((self.folder / "xet" / "xorbs" / "xorbs").glob("default.*[0-9a-f]"))

    def _run(self, code: str, *arguments: str) -> None:
        # In a process of its own, which lets the store go when it ends.
        mine = {key: value for key, value in os.environ.items() if not re.match(r"HF_", key)}
        mine |= {"HF_HOME": str(self.folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
        subprocess.run([sys.executable, "-c", code, *arguments], env=mine, check=True, timeout=120)


def _linked(source: str, target: str) -> None:
    if source.endswith(".redb"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def _files(shard: bytes) -> Iterator[tuple[str, tuple[str, int]]]:
    """SHA-256, Xet hash and size of each file in a shard (huggingface.co/docs/xet/shard)."""
    at = 48
    while shard[at : at + 32] != _END:
        xet_hash = _hex(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, at + 48 * (1 + term) + 36)[0] for term in range(count))
        at += 48 * (1 + count * (2 if flags & _VERIFIED else 1))
        if flags & _WITH_SHA256:
            yield _hex(shard[at : at + 32]), (xet_hash, size)
            at += 48


def _hex(stored: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", stored))
