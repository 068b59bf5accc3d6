"""The large files of all repositories: sent, joined, then known to the one repository once their hash is right."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopback.git import Refusal, Repo
from loopback.xet import XetStore

CHUNK = 1 << 18


class Objects:
    """LFS objects, in a folder by their SHA-256."""

    def __init__(self, storage: Path, xet: bool = False) -> None:
        self.xet = XetStore(storage / "xet") if xet else None
        self.no_xet = False  # tell no Xet hash, without which files cannot be copied between repositories
        self.refuse_copies = False
        self._objects, self._incoming = storage / "objects", storage / "incoming"
        self._etags: dict[str, str] = {}
        for folder in (self._objects, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)

    def object_path(self, oid: str) -> Path:
        path = self._objects / oid
        if self.xet is not None and not path.exists() and oid in self.xet.files():
            self.xet.get(oid, path)
        return path

    def size_of(self, repo: Repo, oid: str) -> int | None:
        """Of an object that the repository may refer to; what came through Xet is told by its SHA-256 alone."""
        if self.xet is not None and oid not in repo.objects and oid in self.xet.files():
            repo.objects[oid] = self.xet.files()[oid][1]
        return repo.objects.get(oid)

    def xet_hash(self, oid: str) -> str:
        if self.xet is None:
            return hashlib.sha256(b"xet" + oid.encode()).hexdigest()
        return self.xet.files()[oid][0]

    @property
    def xet_store(self) -> XetStore:
        assert self.xet is not None
        return self.xet

    def receive(
        self, repo_id: str, oid: str, size: int, part: int, pieces: Iterable[bytes], corrupt: bool = False
    ) -> str:
        """Keep a whole object (part 0) or one part of it; gives the ETag."""
        temporary = self._incoming / uuid.uuid4().hex
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with temporary.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            if temporary.stat().st_size != size:
                raise Refusal(400, f"{temporary.stat().st_size} bytes came, {size} were announced")
            if corrupt:
                with temporary.open("r+b") as file:
                    file.seek(size // 2)
                    byte = file.read(1)
                    file.seek(size // 2)
                    file.write(bytes([byte[0] ^ 1]))
            kept = self._staged(repo_id, oid, part)
            temporary.replace(kept)
            self._etags[kept.name] = digest.hexdigest()
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def join(self, repo_id: str, oid: str, size: int, parts: list[dict[str, Any]]) -> None:
        whole = self._staged(repo_id, oid, 0)
        if whole.exists() and whole.stat().st_size == size:
            return  # the client asks again when the first answer was lost
        kept = [self._staged(repo_id, oid, part["partNumber"]) for part in parts]
        told = [part["etag"].strip('"') for part in parts]
        if told != [self._etags.get(path.name) for path in kept] or sum(path.stat().st_size for path in kept) != size:
            raise Refusal(400, "Parts are missing or do not add up to the object")
        temporary = self._incoming / uuid.uuid4().hex
        with temporary.open("wb") as file:
            for path in kept:
                with path.open("rb") as piece:
                    shutil.copyfileobj(piece, file, CHUNK)
                path.unlink()
                del self._etags[path.name]
        temporary.replace(whole)

    def verify(self, repo: Repo, oid: str, size: int) -> None:
        if repo.objects.get(oid) == size:
            return
        staged = self._staged(repo.id, oid, 0)
        if not staged.exists():
            raise Refusal(404, f"Object {oid} was not uploaded")
        if staged.stat().st_size != size or sha256_of(staged) != oid:
            staged.unlink()
            raise Refusal(422, f"The uploaded object is not {oid} of {size} bytes")
        staged.replace(self.object_path(oid))
        repo.objects[oid] = size

    def duplicate(self, source: Repo, target: Repo, files: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
        answer: dict[str, list[dict[str, str]]] = {"success": [], "failed": []}
        for file in files:
            oid = file["sha256"]
            if self.refuse_copies:
                answer["failed"].append({"sha256": oid, "error": "Repositories are in different storage regions"})
            elif oid not in source.objects or file["xetHash"] != self.xet_hash(oid):
                answer["failed"].append({"sha256": oid, "error": "File not found in the source repository"})
            else:
                target.objects[oid] = source.objects[oid]
                answer["success"].append({"sha256": oid})
        return answer

    def _staged(self, repo_id: str, oid: str, part: int) -> Path:
        return self._incoming / f"{repo_id.replace('/', '--')}--{oid}.{part}"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
