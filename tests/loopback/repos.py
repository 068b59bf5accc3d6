"""What the loopback Hub holds: repositories with their commits, and who may do what to them."""

from __future__ import annotations

import base64
import hashlib
import shutil
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loopback.attributes import GITATTRIBUTES, LARGE, SAMPLE, tracking, upload_mode
from loopback.git import Blob, Commit, Refusal, Repo
from loopback.names import check_branch, check_path, check_repo
from loopback.objects import Objects, sha256_of
from loopback.users import Accounts


class Repos(Objects):
    def __init__(self, storage: Path, tokens: Mapping[str, str] | None = None, xet: bool = False) -> None:
        super().__init__(storage, xet)
        self.accounts = Accounts(dict(tokens or {}))
        self.granted: set[str] = set()  # users who were let into every gated repository
        self.renamed: dict[str, str] = {}  # repositories that have another name now
        self.lock = threading.RLock()
        self._repos: dict[str, Repo] = {}

    # What tests call

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> None:
        check_repo(repo_id)
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
        for path in files:
            check_path(path)
        taken = {path: self._take(repo, path, content) for path, content in files.items()}
        large = [self.object_path(blob.sha256) for blob in taken.values() if blob.content is None]
        if self.xet is not None and large:
            self.xet.put(*large)
        changes: dict[str, Blob | None] = {**taken}
        with self.lock:
            if branch not in repo.branches:
                if not branch.startswith("refs/pr/"):
                    check_branch(branch)
                repo.branches[branch] = repo.branches["main"]
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
        hidden = repo is not None and repo.private and not self.accounts.is_member(user, repo.owner)
        if repo is None or (hidden and user is not None):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if hidden:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def content_readable(self, user: str | None, repo_id: str) -> Repo:
        repo = self.readable(user, repo_id)
        if repo.gated and not self.accounts.is_member(user, repo.owner) and user not in self.granted:
            told = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(401 if user is None else 403, told, "GatedRepo")
        return repo

    def writable(self, user: str | None, repo_id: str, through_pull_request: bool = False) -> Repo:
        if user is None:
            # The client takes a bare 401 of an https Hub for a missing repository; over http it needs the code.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        repo = self.readable(user, repo_id)
        if getattr(user, "role", "write") == "read":
            raise Refusal(403, "You need a token with write access: this one may only read")
        if not through_pull_request and not self.accounts.may_write(user, repo.owner, repo_id):
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
            if branch not in repo.branches:  # a tag or a commit takes nothing
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
            large = [path for path, blob in changes.items() if blob is not None and blob.content is None]
            attributes = changes.get(".gitattributes") or base.files.get(".gitattributes")
            before = attributes.content or b"" if attributes is not None else b""
            if (after := tracking(before, *large)) != before:
                changes[".gitattributes"] = Blob.regular(after)  # as the Hub does, in the same commit
            if pull:
                branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
            made = self.advance(
                repo, branch, header["summary"], changes, header.get("description", ""), author, parent=base
            )
            return branch, made

    def _change(self, repo: Repo, base: Commit, key: str, value: dict[str, Any]) -> dict[str, Blob | None]:
        path = value["path"]
        check_path(path.rstrip("/"))
        if key == "file":
            content = value["content"]
            raw = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
            if len(raw) > LARGE:
                raise Refusal(400, f"{path}: files of more than 10 MiB must be uploaded as large files")
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

    def _take(self, repo: Repo, path: str, content: bytes | Path) -> Blob:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if isinstance(content, bytes):
            sample = content[:SAMPLE]
        else:
            with content.open("rb") as file:
                sample = file.read(SAMPLE)
        if size == 0 or upload_mode(path, size, sample, repo.attributes(repo.at("main"))) == "regular":
            return Blob.regular(content if isinstance(content, bytes) else content.read_bytes())
        oid = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)
        kept = self.object_path(oid)
        if not kept.exists():
            if isinstance(content, bytes):
                kept.write_bytes(content)
            else:
                shutil.copyfile(content, kept)
        repo.objects[oid] = size
        return Blob(size, oid)
