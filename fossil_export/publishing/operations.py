"""What a commit consists of: additions and deletions as the Hub's client has them, and copies of our own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

Operation = Any
"""CommitOperationAdd, CommitOperationDelete or Copy."""


@dataclass(frozen=True)
class Copy:
    """The file `source` of `repository` at `commit`, whose hash is `digest`, is put at `name` by the Hub itself."""

    name: str
    source: str
    repository: str
    commit: str
    digest: str


def name_of(operation: Operation) -> str:
    """The file in the repository."""
    return operation.name if isinstance(operation, Copy) else str(operation.path_in_repo)


def digest_of(operation: Operation) -> str | None:
    """What the Hub will list as the file's hash: SHA-256 of a large one, git's SHA-1 of a small one; None if gone."""
    if isinstance(operation, Copy):
        return operation.digest
    if not hasattr(operation, "upload_info"):
        return None
    if operation._upload_mode == "lfs":
        return str(operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def for_client(operation: Operation, repo_id: str) -> Any:
    """The operation as the Hub's client takes it, in a commit to `repo_id`."""
    from huggingface_hub import CommitOperationCopy

    if isinstance(operation, Copy):
        # A new one each time: the client marks copies as done once they were tried.
        other = {} if operation.repository == repo_id else {"src_repo_id": operation.repository}
        other |= {"src_repo_type": "model"} if other else {}
        return CommitOperationCopy(operation.source, operation.name, operation.commit, **other)
    if hasattr(operation, "upload_info"):
        # That the branch held the same when it was uploaded does not say that it still does.
        operation._remote_oid = None
    return operation


def uploaded(name: str, size: int, sha256: str, sample: bytes) -> Any:
    """The addition of a file whose content the Hub has already and this machine has no more."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(name, b"")
    operation.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation
