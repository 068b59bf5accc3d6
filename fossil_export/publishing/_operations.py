"""What a commit consists of: additions and deletions as the Hub's client has them, and copies of our own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from fossil_export.storage.hub import _client as client

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
    if client.is_large(operation):
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
        client.forget_remote(operation)
    return operation


def uploaded(name: str, size: int, sha256: str, sample: bytes) -> Any:
    """The addition of a file whose content the Hub has already and this machine has no more."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, b"")
    upload = operation.upload_info
    upload.size, upload.sample, upload.sha256 = size, sample, bytes.fromhex(sha256)
    client.mark_uploaded(operation)
    return operation
