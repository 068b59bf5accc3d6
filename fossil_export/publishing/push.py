"""`push`: a finished artifact becomes a repository on the Hub, in one commit."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fossil_export.checkpoints.companions import CARD
from fossil_export.errors import CheckpointError
from fossil_export.publishing.about import card_for, facts_of, local_names
from fossil_export.publishing.closing import Closing, closing
from fossil_export.publishing.operations import Operation
from fossil_export.publishing.parts import parts_of
from fossil_export.publishing.paths import ADAPTER_CONFIG, Paths, is_path
from fossil_export.publishing.repository import Repository
from fossil_export.publishing.result import Progress, PushResult
from fossil_export.publishing.stale import refuse_base, stale
from fossil_export.storage import expanded, resolve

LARGE = 1 << 20
"""Bytes from which a file is uploaded by itself, and named while it is."""


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
    started = time.perf_counter()
    repository = Repository(repo_id, revision, create_pr)
    from huggingface_hub import CommitOperationAdd

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
    # What will be refused is refused before anything is sent.
    refuse_base(facts, repository)
    stale(facts, there)
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
    ends: list[Closing] = []

    def build(head: str, there: Mapping[str, str]) -> Sequence[Operation]:
        ends[:] = [closing(repository, facts, parts.card, additions, head, there)]
        return ends[0].operations

    progress("committing")
    commit = repository.commit(build, commit_message or message(parts.kind))
    if is_path(str((parts.config or {}).get("base_model_name_or_path") or "a/b")):
        problems.append(
            f"{ADAPTER_CONFIG} names the base by a path, which was left out; if it is on the Hub, write its id there"
        )
    notes = [note.replace("verify DIR`", f"verify {shlex.quote(str(folder))}`") for note in ends[0].notes]
    found, removed = [*repository.notes, *problems, *notes], ends[0].removed
    size = sum(addition.upload_info.size for addition in additions)
    return PushResult.of(repository, commit, started, names, size, found, removed, parts.left_behind)


def message(kind: str) -> str:
    """The commit's title where the user gave none."""
    what = {"merged": "merged model", "gguf-lora": "GGUF adapter", "onnx": "ONNX model"}.get(kind, "adapter")
    return f"Upload {what} with fossil-export"


def _found(folder: str | Path) -> Path:
    path = expanded(folder, CheckpointError)
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = True  # what is wrong with it is said below
    if not there:
        raise CheckpointError(f"{folder}: no such file or folder; name one that `merge`, `convert` or `onnx` wrote")
    return resolve(folder, CheckpointError, "artifact")
