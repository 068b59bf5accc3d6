"""`push`: a finished artifact becomes a repository on the Hub, in one commit."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.checkpoints.companions import CARD
from fossil_export.errors import CheckpointError
from fossil_export.hub import expanded, resolve
from fossil_export.publishing.about import card_for, facts_of, local_names
from fossil_export.publishing.parts import parts_of
from fossil_export.publishing.paths import ADAPTER_CONFIG, Paths, is_path
from fossil_export.publishing.repository import Commit, Repository
from fossil_export.publishing.stale import removal_warnings, stale

Progress = Callable[[str], None]

LARGE = 1 << 20
"""Bytes from which a file is uploaded by itself, and named while it is."""


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now. `files` are the names published, `left_behind` those in the folder that are no part of
    the model, `removed` weights of an earlier model that stood in the way; `pr_url` is None unless asked for."""

    repo_id: str
    revision: str
    commit: str
    url: str
    pr_url: str | None
    changed: bool
    files: tuple[str, ...]
    removed: tuple[str, ...]
    left_behind: tuple[str, ...]
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "repo_id": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "url": self.url,
            "pr_url": self.pr_url,
            "changed": self.changed,
            "files": list(self.files),
            "removed": list(self.removed),
            "left_behind": list(self.left_behind),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: Progress = lambda step: None,
) -> PushResult:
    """Publish `folder` (a merged model, a LoRA, MISS or ONNX folder, or a GGUF file) as `repo_id`.

    A new repository is `private` if asked for; `revision` is the branch (made if it is not there), `create_pr` opens a
    pull request instead of committing. Files that are no part of the model stay behind; the model card is written, or
    the one that is there extended. Everything appears in one commit; interrupted, the same call goes on with what is
    not uploaded yet. `progress` is called with the name of each step. Raises a FossilExportError in one line.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    started = time.perf_counter()
    repository = Repository(repo_id, revision, create_pr)
    parts = parts_of(_found(folder))
    progress(f"opening {repo_id}")
    repository.prepare(private)
    names = (*parts.names, CARD)
    paths = Paths([parts.folder], local_names(parts.record, parts.certificate, parts.config))
    certificate = parts.certificate
    if certificate is not None:  # which the card quotes
        certificate = {**certificate, "reason": paths.without(certificate).get("reason")}
    facts, problems = facts_of(repository.repo_id, parts.kind, names, parts.record, certificate, parts.config)
    head = repository.head()
    there = repository.files(head)
    stale(facts, there)  # what will be refused is refused before anything is sent
    problems += [*parts.notes, *repository.validate(card_for(repository, facts, parts.card, head, there)[0])]
    additions = []
    for name in parts.names:
        path = parts.path(name).absolute()
        content = paths.published(name, path.read_bytes()) if name.endswith(".json") else None
        additions.append(CommitOperationAdd(name, path if content is None else content))
    large = [addition for addition in additions if addition.upload_info.size >= LARGE]
    for addition in sorted(large, key=lambda one: -one.upload_info.size):
        progress(f"uploading {addition.path_in_repo}")
        repository.upload(addition)
    repository.upload(*(addition for addition in additions if addition not in large))
    notes: list[str] = []
    removed: list[str] = []

    def build(head: str, there: Mapping[str, str]) -> list[Any]:
        text, notes[:] = card_for(repository, facts, parts.card, head, there)
        card = CommitOperationAdd(CARD, text)
        repository.upload(card)
        removed[:] = stale(facts, there)
        return [*additions, card, *(CommitOperationDelete(name) for name in removed)]

    progress("committing")
    commit = repository.commit(build, commit_message or message(parts.kind))
    if is_path(str((parts.config or {}).get("base_model_name_or_path") or "a/b")):
        problems.append(
            f"{ADAPTER_CONFIG} names the base by a path, which was left out; if it is on the Hub, write its id there"
        )
    notes = [note.replace("verify DIR`", f"verify {shlex.quote(str(folder))}`") for note in notes]
    found = [*repository.notes, *problems, *notes, *removal_warnings(repository.repo_id, removed)]
    return PushResult(
        repo_id=repository.repo_id,
        revision=revision or "main",
        commit=commit.oid,
        url=address(repository, commit),
        pr_url=commit.pr_url,
        changed=commit.changed,
        files=names,
        removed=tuple(removed),
        left_behind=parts.left_behind,
        nbytes=sum(addition.upload_info.size for addition in additions),
        seconds=time.perf_counter() - started,
        warnings=tuple(found),
    )


def message(kind: str) -> str:
    """The commit's title where the user gave none."""
    what = {"merged": "merged model", "gguf-lora": "GGUF adapter", "onnx": "ONNX model"}.get(kind, "adapter")
    return f"Upload {what} with fossil-export"


def address(repository: Repository, commit: Commit) -> str:
    """Where to look at what was published."""
    return commit.pr_url or repository.page


def _found(folder: str | Path) -> Path:
    path = expanded(folder, CheckpointError)
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = True  # what is wrong with it is said below
    if not there:
        raise CheckpointError(f"{folder}: no such file or folder; name one that `merge`, `convert` or `onnx` wrote")
    return resolve(folder, CheckpointError, "artifact")
