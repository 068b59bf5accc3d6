"""`push`: a finished artifact becomes a repository on the Hub, in one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.checkpoints.companions import CARD, CERTIFICATE, PROVENANCE, is_weights
from fossil_export.checkpoints.jsonfile import write_json
from fossil_export.errors import CheckpointError, HubError, listed
from fossil_export.hub import resolve
from fossil_export.hub.resolve import is_on_hub
from fossil_export.publishing.about import facts_of
from fossil_export.publishing.card import BEGIN, END, Facts, model_card, warnings
from fossil_export.publishing.parts import parts_of
from fossil_export.publishing.repository import Commit, Repository, digest_of

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
    from huggingface_hub import CommitOperationAdd

    started = time.perf_counter()
    parts = parts_of(resolve(folder, CheckpointError, "artifact"))
    if not parts.names:
        raise CheckpointError(f"{folder}: holds nothing to push")
    repository = Repository(repo_id, revision, create_pr)
    progress(f"opening {repo_id}")
    repository.prepare(private)
    facts, problems = facts_of(
        repository.repo_id, parts.kind, parts.names, parts.record, parts.certificate, parts.config
    )
    # Records go without the paths of this machine.
    replaced = {
        PROVENANCE: None if parts.record is None else without_paths(parts.record),
        CERTIFICATE: None if parts.certificate is None else without_paths(parts.certificate, parts.record),
    }
    additions = []
    for name in parts.names:
        new = replaced.get(name)
        additions.append(CommitOperationAdd(name, parts.path(name) if new is None else write_json(new)))
    large = [addition for addition in additions if addition.upload_info.size >= LARGE]
    for addition in sorted(large, key=lambda one: -one.upload_info.size):
        progress(f"uploading {addition.path_in_repo}")
        repository.upload(addition)
    repository.upload(*(addition for addition in additions if addition not in large))
    own = parts.path(CARD).read_text(encoding="utf-8") if parts.path(CARD).is_file() else None
    removed: list[str] = []

    def build() -> list[Any]:
        card, stale = card_and_stale(repository, facts, own)
        removed[:] = [operation.path_in_repo for operation in stale]
        repository.upload(card)
        return [*additions, card, *stale]

    progress("committing")
    commit = repository.commit(build, commit_message or message(parts.kind))
    progress("checking what is published")
    repository.check(commit, {addition.path_in_repo: digest_of(addition) for addition in additions})
    found = [*repository.warnings, *problems, *warnings(facts, own), *removal_warnings(repository, removed)]
    return PushResult(
        repo_id=repository.repo_id,
        revision=revision or "main",
        commit=commit.oid,
        url=address(repository, commit),
        pr_url=commit.pr_url,
        changed=commit.changed,
        files=(*parts.names, CARD),
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
    if commit.pr_url is not None:
        return commit.pr_url
    return repository.page if repository.revision is None else f"{repository.page}/tree/{repository.revision}"


def card_and_stale(repository: Repository, facts: Facts, own: str | None) -> tuple[Any, list[Any]]:
    """The card as an addition, and deletions of what would be loaded instead of a merged model.

    The card extends `own`, the one in the folder, where that has words of the user's, else the one on the Hub.
    Raises HubError where the repository holds an adapter, with which loaders would take the model for its base.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = repository.files()
    existing = own
    if (own is None or not _words(own)) and CARD in there:
        existing = repository.card() or own
    stale = []
    if facts.kind == "merged":
        if "adapter_config.json" in there:
            raise HubError(
                f"{repository.repo_id}: holds an adapter, which loaders would put on top of the merged model; choose "
                "another repository"
            )
        stale = [name for name in there if "/" not in name and _is_loaded(name) and name not in facts.files]
    card = CommitOperationAdd(CARD, model_card(facts, existing).encode())
    return card, [CommitOperationDelete(name) for name in stale]


def removal_warnings(repository: Repository, removed: list[str]) -> list[str]:
    if not removed:
        return []
    return [
        f"{repository.repo_id}: {listed(removed)} of an earlier model would have been loaded instead and went with "
        "this commit; its history still has them"
    ]


def without_paths(record: Mapping[str, Any], names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A record without the paths of this machine: their last part stands for them.

    `names` is the record whose base name a certificate takes over.
    """
    result = dict(record)
    for part in ("base", "adapter"):
        entry = result.get(part)
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            result[part] = {**entry, "name": _without_path(entry["name"], entry.get("revision"))}
        elif isinstance(entry, str):
            other = ((names or {}).get(part) or {}) if names is not None else {}
            result[part] = _without_path(other.get("name") or entry, other.get("revision"))
    return result


def _without_path(name: str, revision: Any) -> str:
    return name if revision is not None and is_on_hub(name) else Path(name).name


def _is_loaded(name: str) -> bool:
    """Whether transformers may take the file for the model's weights."""
    return is_weights(name) and any(ending in name for ending in (".safetensors", ".bin"))


def _words(card: str) -> bool:
    """Whether a card holds more than metadata and what fossil-export wrote."""
    body = card
    if BEGIN in body and END in body:
        body = body[: body.index(BEGIN)] + body[body.index(END) + len(END) :]
    if body.lstrip().startswith("---"):
        body = body.lstrip()[3:].partition("\n---")[2]
    return any(line.strip() and not line.startswith("# ") for line in body.splitlines())
