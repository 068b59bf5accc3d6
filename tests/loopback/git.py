"""What git knows of a repository: its blobs, its commits and its branches; and an answer that refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


class Refusal(Exception):
    """An error answer: the client chooses its exception by the status and `X-Error-Code`. From the storage host it goes
    as S3's XML, with `code` in it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Blob:
    size: int
    sha256: str
    content: bytes | None = None  # None: an LFS object, whose bytes are in the storage folder

    @property
    def pointer(self) -> bytes:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            self.size,
        )

    @property
    def oid(self) -> str:
        stored = self.pointer if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        return cls(len(content), hashlib.sha256(content).hexdigest(), content)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # pull requests are here too, as refs/pr/N
    objects: dict[str, int] = field(default_factory=dict)  # LFS objects this repository may refer to: sha256 -> size

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def attributes(self, commit: Commit) -> bytes:
        """Its .gitattributes at a commit."""
        found = commit.files.get(".gitattributes")
        return found.content or b"" if found is not None else b""

    def at(self, revision: str) -> Commit:
        head = self.branches.get(revision.removeprefix("refs/heads/"))
        if head is not None:
            return self.commits[head]
        if len(revision) >= 7:
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def last_change(self, commit: Commit, path: str) -> Commit:
        for older in self.history(commit):
            if older.files.get(path) != commit.files.get(path):
                break
            newest = older
        return newest
