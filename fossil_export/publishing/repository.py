"""The repository on the Hub that is written to: uploads first, then everything in one commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.errors import FossilExportError, HubError, listed
from fossil_export.hub.errors import ATTEMPTS, PAUSE, endpoint, explained, is_conflict, is_transient, retried


@dataclass(frozen=True)
class Commit:
    """What was published: the commit, where to look at it, and the pull request's page where it is one.

    `changed` is False where the repository held just this already.
    """

    oid: str
    url: str
    pr_url: str | None
    changed: bool


class CopyRefusedError(FossilExportError):
    """The Hub does not copy these files from one repository to the other."""


class Repository:
    """A model repository, of which one branch (default: main) or a pull request takes the commit."""

    def __init__(self, repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo_id)
        except ValueError as problem:
            raise HubError(f"{repo_id}: is no name of a repository ({problem}); write user/name") from problem
        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.warnings: list[str] = []
        self._api = HfApi(library_name="fossil-export")

    @property
    def page(self) -> str:
        return f"{endpoint()}/{self.repo_id}"

    def prepare(self, private: bool = False) -> None:
        """See that repository and branch exist and may be written to. `private` is for a new one."""

        def run() -> None:
            if "/" not in self.repo_id or not self._api.repo_exists(self.repo_id):
                self.repo_id = self._api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            elif private and not self._api.model_info(self.repo_id).private:
                self.warnings.append(f"{self.repo_id}: exists already and stays public; --private is for a new one")
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

        retried(run, self.repo_id, "opening it")

    def files(self, revision: str | None = None) -> dict[str, str]:
        """What is there: name to SHA-256 (large files) or git's SHA-1."""

        def run() -> dict[str, str]:
            listing = self._api.list_repo_tree(
                self.repo_id, recursive=True, revision=revision or self.revision, expand=False
            )
            return {
                file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id
                for file in listing
                if hasattr(file, "blob_id")
            }

        return retried(run, self.repo_id, "listing it")

    def card(self) -> str | None:
        """The README.md that is there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        def run() -> str | None:
            try:
                path = hf_hub_download(self.repo_id, "README.md", revision=self.revision)
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8")

        return retried(run, self.repo_id, "reading its README.md")

    def upload(self, *additions: Any) -> None:
        """Bring the content of large files to the Hub, where no commit shows it yet; small ones go with the commit.

        `additions` are CommitOperationAdd. What the Hub has already is not sent again.
        """
        names = [addition.path_in_repo for addition in additions]

        def run() -> None:
            self._api.preupload_lfs_files(
                self.repo_id,
                list(additions),
                revision=self.revision,
                create_pr=self.create_pr or None,
                free_memory=False,
            )

        retried(run, self.repo_id, f"uploading {listed(names)}")
        if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
            raise HubError(
                f"{self.repo_id}: its .gitignore leaves out {listed(ignored)}; change it, then run the command again"
            )

    def holds(self, uploads: Iterable[Any]) -> set[str]:
        """SHA-256 of those contents (UploadInfo) that the Hub has for this repository."""
        from huggingface_hub.lfs import post_lfs_batch_info

        uploads = list(uploads)
        if not uploads:
            return set()

        def run() -> set[str]:
            found, _, _ = post_lfs_batch_info(
                upload_infos=uploads,
                token=None,
                repo_type="model",
                repo_id=self.repo_id,
                revision=self.revision or "main",
                endpoint=endpoint(),
            )
            return {entry["oid"] for entry in found if not entry.get("actions")}

        return retried(run, self.repo_id, "asking what it holds")

    def commit(self, build: Callable[[], list[Any]], message: str, description: str = "") -> Commit:
        """One commit of the operations that `build` gives; it is asked again where the branch moved meanwhile.

        A commit whose answer was lost is recognised by its files. Raises CopyRefusedError where only the copies
        are in the way, HubError otherwise.
        """
        pause = PAUSE
        for attempt in range(ATTEMPTS):
            operations = build()
            head = None if self.create_pr else self._head()
            try:
                info = self._api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.revision,
                    create_pr=self.create_pr or None,
                    parent_commit=head,
                )
                return Commit(info.oid, info.commit_url, info.pr_url, info.oid != head)
            except Exception as problem:
                copies = any(hasattr(operation, "src_path_in_repo") for operation in operations)
                if copies and _is_copy_refusal(problem):
                    raise CopyRefusedError(str(explained(problem, self.repo_id, "copying on the Hub"))) from problem
                again = not self.create_pr and (is_conflict(problem) or is_transient(problem))
                if again and (now := self._head()) != head and self._has(operations, now):
                    return Commit(now, f"{self.page}/commit/{now}", None, True)
                if not again or attempt == ATTEMPTS - 1:
                    raise explained(problem, self.repo_id, "committing") from problem
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def check(self, commit: Commit, expected: Mapping[str, str]) -> None:
        """Hold what is published against the hashes of what was meant. Raises HubError."""
        from urllib.parse import urlsplit

        revision = commit.oid
        if commit.pr_url is not None:
            revision = f"refs/pr/{urlsplit(commit.pr_url).path.rstrip('/').rpartition('/')[2]}"
        found = self.files(revision)
        wrong = [name for name, digest in expected.items() if found.get(name) != digest]
        if wrong:
            raise HubError(f"{self.repo_id}: {listed(wrong)} is not what was uploaded; run the same command again")

    def _head(self) -> str:
        return retried(
            lambda: str(self._api.model_info(self.repo_id, revision=self.revision).sha), self.repo_id, "opening it"
        )

    def _has(self, operations: Iterable[Any], revision: str) -> bool:
        """Whether that revision holds what the operations add."""
        found = self.files(revision)
        additions = [operation for operation in operations if hasattr(operation, "upload_info")]
        return all(found.get(addition.path_in_repo) == digest_of(addition) for addition in additions)


def digest_of(addition: Any) -> str:
    """What the Hub will list as the hash of an addition: SHA-256 of a large file, git's SHA-1 of a small one."""
    if addition._upload_mode == "lfs":
        return str(addition.upload_info.sha256.hex())
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def uploaded(name: str, size: int, sha256: str, sample: bytes) -> Any:
    """The operation for a file whose content the Hub has already and this machine has no more."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(name, b"")
    operation.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def _is_copy_refusal(problem: BaseException) -> bool:
    """Whether it was the copying between repositories that failed, and not for want of an answer."""
    if is_transient(problem):
        return False
    if type(problem).__name__ == "FileDuplicationError" or str(problem).startswith("Cannot duplicate"):
        return True
    response = getattr(problem, "response", None)
    return response is not None and str(response.url.path).endswith("/lfs-files/duplicate")
