"""The plan of a push: what of a folder goes to the Hub, and, if the Hub was asked, what it meets there."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export.artifacts._kind import ADAPTER_CONFIG
from fossil_export.artifacts._kinds import KINDS
from fossil_export.artifacts._parts import Parts, parts_of
from fossil_export.cards import Facts
from fossil_export.cards._frontmatter import read_card
from fossil_export.checkpoints._companions import CARD
from fossil_export.checkpoints._stamp import Stamp, stamps_of
from fossil_export.errors import CheckpointError
from fossil_export.publishing._about import extended_card, facts_of, holds_template, local_names
from fossil_export.publishing._looking import look
from fossil_export.publishing._paths import Paths, is_path
from fossil_export.publishing._stale import refuse_base, removal_warnings, stale
from fossil_export.publishing._target import Target
from fossil_export.storage import expanded, resolve
from fossil_export.storage._paths import near_to

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class PushPlan:
    """What a push will do, as `plan_push` decides it.

    Attributes:
        folder: What is published.
        kind: What it is: "merged", "onnx" and so on.
        repo_id: The repository.
        revision: The branch, None for main.
        create_pr: Whether a pull request is opened.
        private: Whether a new repository is private.
        title: Of the commit.
        files: By name, the bytes of what goes, but for the card.
        left_behind: Names in the folder that are no part of the model.
        parts: What was found in the folder.
        stamps: Of the files that go.
        exists: Whether the repository is there, None if that is not known.
        removed: Files of an earlier model that would go.
        card: The metadata of the model card.
        warnings: Lines that the user should see.
        unchecked: A line for each thing that the Hub could not be asked.
    """

    folder: str
    kind: str
    repo_id: str
    revision: str | None
    create_pr: bool
    private: bool
    title: str
    files: Mapping[str, int]
    left_behind: tuple[str, ...]
    parts: Parts = field(repr=False)
    stamps: Mapping[Path, Stamp] = field(repr=False)
    exists: bool | None = None
    removed: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return line(
            "PushPlan",
            f"of {self.folder} ({self.kind}) to {self.repo_id}: {len(self.files) + 1} files, "
            f"{self.nbytes:,} bytes and the card; {len(self.left_behind)} left behind",
        )

    def _repr_html_(self) -> str:
        exists = {True: "is there", False: "would be made", None: None}[self.exists]
        rows = [
            ("folder", self.folder),
            ("kind", self.kind),
            ("repository", self.repo_id + (f" ({exists})" if exists else "")),
            ("branch", self.revision),
            ("files", f"{len(self.files) + 1}, {readable_bytes(self.nbytes)} and the card"),
            ("left behind", ", ".join(self.left_behind)),
            ("removed", ", ".join(self.removed)),
        ]
        return table("Plan of a push", rows, [*self.warnings, *self.unchecked])

    @property
    def nbytes(self) -> int:
        """Bytes of the files, but for the card."""
        return sum(self.files.values())

    def told(self, problems: Iterable[str], notes: Iterable[str]) -> tuple[str, ...]:
        """What to tell the user: `problems` of the files, and `notes` of the card."""
        named = (note.replace("verify DIR`", f"verify {shlex.quote(self.folder)}`") for note in notes)
        base = str((self.parts.config or {}).get("base_model_name_or_path") or "a/b")
        if not is_path(base):
            return (*problems, *named)
        remedy = "if it is on the Hub, write its id there"
        return (*problems, f"{ADAPTER_CONFIG} names the base by a path, which was left out; {remedy}", *named)

    def check(self) -> None:
        """Raise CheckpointError if a file that goes, or the card, is another one by now."""
        for path, stamp in self.stamps.items():
            if stamps_of([path]) != {path: stamp}:
                raise CheckpointError(f"{path}: has changed since the push was planned; plan it again")

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--json` prints it."""
        return {
            "folder": self.folder,
            "kind": self.kind,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "create_pr": self.create_pr,
            "private": self.private,
            "title": self.title,
            "files": [{"file": name, "bytes": nbytes} for name, nbytes in self.files.items()],
            "bytes": self.nbytes,
            "left_behind": list(self.left_behind),
            "exists": self.exists,
            "removed": list(self.removed),
            "card": _plain(self.card),
            "warnings": list(self.warnings),
            "unchecked": list(self.unchecked),
        }


def _plain(value: Any) -> Any:
    """What JSON has no word for as text: YAML knows dates, and numbers that are none."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


@reporting
def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: Shown = False,
) -> PushPlan:
    """What `push` with the same arguments would do; nothing is made or sent.

    Nobody need be logged in: what the Hub does not tell is `unchecked`. It is not asked what it has against the card's
    metadata.

    Args:
        folder: What was written by `merge`, `convert` or `export_onnx`: a folder, or a GGUF file.
        repo_id: The repository on the Hub, "user/name". It is made if it is not there.
        private: True makes a new repository private. One that is there stays as it is.
        revision: The branch to commit to, made if it is not there. Default: main.
        create_pr: True opens a pull request instead of committing.
        commit_message: Title of the commit. Default: one that says what was published.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        PushPlan: `files` (bytes by name), `nbytes`, `left_behind`, `exists` (None if that is not known), `removed`,
            `card` (its metadata), `warnings`, `unchecked` (what could not be asked), and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        CheckpointError: The folder is no artifact, or changes meanwhile.
        HubError: The Hub refuses, cannot be reached, or the repository holds something else.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_push("merged", "user/my-model")  # doctest: +SKIP
        >>> list(plan.files)  # doctest: +SKIP
        ['config.json', 'model.safetensors']
    """
    plan = plan_files(folder, repo_id, private, revision, create_pr, commit_message)
    begin("asking the Hub")
    target = Target(repo_id, revision, create_pr)
    found = look(target, private)
    facts, problems = facts_for(plan.parts, target.repo_id)
    refuse_base(facts, target)
    removed = stale(facts, found.files)
    content, notes = extended_card(facts, plan.parts.card, found.card)
    said = [*target.notes, *problems, *plan.parts.notes]
    return replace(
        plan,
        repo_id=target.repo_id,
        exists=found.exists,
        removed=tuple(removed),
        card=read_card(content.decode())[2],
        warnings=plan.told(said, [*notes, *removal_warnings(target.repo_id, removed, planned=True)]),
        unchecked=found.unchecked,
    )


def plan_files(
    folder: str | Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, commit_message: str | None
) -> PushPlan:
    """The plan as far as the folder tells it; the Hub is not asked."""
    Target(repo_id, revision, create_pr)  # a wrong name shows first
    begin("looking at the files")
    parts = parts_of(_found(folder))
    parts = replace(parts, folder=parts.folder.absolute())  # the plan may be run from another folder
    return PushPlan(
        folder=str(folder),
        kind=parts.kind,
        repo_id=repo_id,
        revision=revision,
        create_pr=create_pr,
        private=private,
        title=commit_message or KINDS[parts.kind].commit_title,
        files={name: _size(content) for name, content in contents_of(parts).items()},
        left_behind=parts.left_behind,
        parts=parts,
        stamps=stamps_of(parts.path(name) for name in (*parts.names, *([CARD] if parts.card is not None else []))),
    )


def contents_of(parts: Parts) -> dict[str, Path | bytes]:
    """What is published of each file: the file, or its text without paths of this machine."""
    paths = paths_for(parts)
    found: dict[str, Path | bytes] = {}
    for name in parts.names:
        path = parts.path(name)
        found[name] = paths.published(name, path.read_bytes()) if name.endswith(".json") else path
    return found


def paths_for(parts: Parts) -> Paths:
    """What reads as a path of this machine in the files of an artifact."""
    return Paths([parts.folder], local_names(parts.record, parts.certificate, parts.config))


def facts_for(parts: Parts, repo_id: str) -> tuple[Facts, list[str]]:
    """What the card says of an artifact that goes to `repo_id`, and what could not be found out."""
    certificate = parts.certificate
    if certificate is not None:  # which the card quotes
        certificate = {**certificate, "reason": paths_for(parts).without(certificate).get("reason")}
    chats = holds_template({name: parts.path(name) for name in parts.names})
    return facts_of(repo_id, parts.kind, (*parts.names, CARD), parts.record, certificate, parts.config, chats)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _found(folder: str | Path) -> Path:
    path = expanded(folder, CheckpointError)
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = True  # what is wrong with it is said below
    if not there:
        near = near_to(str(folder))
        meant = f"did you mean {near}?" if near else "name one that `merge`, `convert` or `onnx` wrote"
        raise CheckpointError(f"{folder}: no such file or folder; {meant}")
    return resolve(folder, CheckpointError, "artifact")
