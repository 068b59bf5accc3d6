"""What the loopback Hub holds: repositories with their commits, revisions and blobs, and who may do what to them."""

from __future__ import annotations

import base64
import hashlib
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loopback_xet import XetStore

CHUNK = 1 << 18
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".onnx.data", ".onnx_adapter")
# The Hub starts every repository with this file, in a first commit of its own.
GITATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in LFS_SUFFIXES)


class Refusal(Exception):
    """An error answer: the client chooses its exception by the status and `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


def upload_mode(path: str, size: int) -> str:
    heavy = size > 10 * 1024 * 1024 or (Path(path).name == "tokenizer.json" and size > 100_000)
    return "lfs" if heavy or path.endswith(LFS_SUFFIXES) else "regular"


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


class Repos:
    def __init__(self, storage: Path, tokens: Mapping[str, str] | None = None, xet: bool = False) -> None:
        self.tokens = dict(tokens or {})
        self.xet = XetStore(storage / "xet") if xet else None
        self.granted: set[str] = set()  # users who were let into every gated repository
        self.refuse_copies = False
        self.renamed: dict[str, str] = {}  # repositories that have another name now
        self.no_xet = False
        self.lock = threading.RLock()
        self._repos: dict[str, Repo] = {}
        self._objects, self._incoming = storage / "objects", storage / "incoming"
        self._etags: dict[str, str] = {}
        for folder in (self._objects, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)

    # What tests call

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> None:
        repo = Repo(repo_id, private, gated)
        with self.lock:
            self._repos[repo_id] = repo
            self.advance(repo, "main", "initial commit", {".gitattributes": Blob.regular(GITATTRIBUTES)})

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        message: str = "Change files",
        branch: str = "main",
        delete: Iterable[str] = (),
    ) -> str:
        """A commit made behind the client's back; an unknown branch starts from main."""
        repo = self._repos[repo_id]
        taken = {path: self._take(repo, path, content) for path, content in files.items()}
        large = [self.object_path(blob.sha256) for blob in taken.values() if blob.content is None]
        if self.xet is not None and large:
            self.xet.put(*large)
        changes: dict[str, Blob | None] = {**taken}
        with self.lock:
            repo.branches.setdefault(branch, repo.branches["main"])
            return self.advance(repo, branch, message, changes | dict.fromkeys(delete)).sha

    def add_folder(self, repo_id: str, folder: Path) -> str:
        if repo_id not in self._repos:
            self.create(repo_id)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return self.commit(repo_id, files, "Add folder")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, tuple[int, str]]:
        return {path: (blob.size, blob.sha256) for path, blob in self._repos[repo_id].at(revision).files.items()}

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        blob = self._repos[repo_id].at(revision).files[path]
        return self.object_path(blob.sha256).read_bytes() if blob.content is None else blob.content

    def head(self, repo_id: str, branch: str = "main") -> str:
        return self._repos[repo_id].at(branch).sha

    def commits(self, repo_id: str, branch: str = "main") -> list[str]:
        repo = self._repos[repo_id]
        return [commit.title for commit in repo.history(repo.at(branch))]

    def repos(self) -> list[str]:
        return sorted(self._repos)

    # Who may do what

    def readable(self, user: str | None, repo_id: str) -> Repo:
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and user not in (None, repo.owner)):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repo.private and user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def content_readable(self, user: str | None, repo_id: str) -> Repo:
        repo = self.readable(user, repo_id)
        if repo.gated and user != repo.owner and user not in self.granted:
            told = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(401 if user is None else 403, told, "GatedRepo")
        return repo

    def writable(self, user: str | None, repo_id: str, through_pull_request: bool = False) -> Repo:
        if user is None:
            # The client takes a bare 401 of an https Hub for a missing repository; over http it needs the code.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        repo = self.readable(user, repo_id)
        if user != repo.owner and not through_pull_request:
            told = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            raise Refusal(403, told)
        return repo

    # Commits

    def advance(
        self,
        repo: Repo,
        branch: str,
        title: str,
        changes: Mapping[str, Blob | None],
        description: str = "",
        author: str = "loopback",
        parent: Commit | None = None,
    ) -> Commit:
        """Put a commit on the branch; None deletes a file."""
        if parent is None and branch in repo.branches:
            parent = repo.at(branch)
        merged = {**(parent.files if parent else {}), **changes}
        files = {path: blob for path, blob in sorted(merged.items()) if blob is not None}
        onto = parent.sha if parent else None
        seed = [repo.id, branch, title, len(repo.commits), onto, *((path, blob.sha256) for path, blob in files.items())]
        sha = hashlib.sha1(repr(seed).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        made = Commit(sha, onto, title, description, author, date, files)
        repo.commits[sha] = made
        repo.branches[branch] = sha
        return made

    def push(self, repo: Repo, branch: str, lines: list[dict[str, Any]], author: str, pull: bool) -> tuple[str, Commit]:
        """The Hub's commit call, all of it or nothing; gives the branch it landed on."""
        with self.lock:
            if branch not in repo.branches:
                raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            header = lines[0]["value"]
            base = repo.at(branch)
            wanted = header.get("parentCommit")
            if wanted is not None and pull:
                base = repo.at(wanted)
            elif wanted is not None and not base.sha.startswith(wanted):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            changes: dict[str, Blob | None] = {}
            for line in lines[1:]:
                changes |= self._change(repo, base, line["key"], line["value"])
            if pull:
                branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
            made = self.advance(
                repo, branch, header["summary"], changes, header.get("description", ""), author, parent=base
            )
            return branch, made

    def _change(self, repo: Repo, base: Commit, key: str, value: dict[str, Any]) -> dict[str, Blob | None]:
        path = value["path"]
        if key == "file":
            content = value["content"]
            raw = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
            return {path: Blob.regular(raw)}
        if key == "lfsFile":
            size = self.size_of(repo, value["oid"])
            if size is None or value.get("size", size) != size:
                raise Refusal(400, f"LFS pointer of {path} points to a file that was not uploaded to {repo.id}")
            return {path: Blob(size, value["oid"])}
        if key not in ("deletedFile", "deletedFolder"):
            raise Refusal(400, f"Unknown operation {key}")
        inside = path.rstrip("/") + "/"
        gone = [name for name in base.files if name == path or (key == "deletedFolder" and name.startswith(inside))]
        if not gone:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return dict.fromkeys(gone)

    # LFS objects: sent, joined, then known to the one repository once their hash is right

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
        if staged.stat().st_size != size or _sha256(staged) != oid:
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

    def _take(self, repo: Repo, path: str, content: bytes | Path) -> Blob:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size == 0 or upload_mode(path, size) == "regular":
            return Blob.regular(content if isinstance(content, bytes) else content.read_bytes())
        oid = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else _sha256(content)
        kept = self.object_path(oid)
        if not kept.exists():
            if isinstance(content, bytes):
                kept.write_bytes(content)
            else:
                shutil.copyfile(content, kept)
        repo.objects[oid] = size
        return Blob(size, oid)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
