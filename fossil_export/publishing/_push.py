"""`push`: a finished artifact becomes a repository on the Hub, in one commit."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fossil_export._progress import Shown, begin, reporting
from fossil_export.checkpoints._companions import CARD
from fossil_export.errors import FossilExportError, longer
from fossil_export.merging._merge import MergeResult
from fossil_export.publishing._about import card_for
from fossil_export.publishing._closing import Closing, closing
from fossil_export.publishing._operations import Operation
from fossil_export.publishing._push_plan import PushPlan, contents_of, facts_for, plan_files
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._result import PushResult
from fossil_export.publishing._stale import refuse_base, stale

LARGE = 1 << 20
"""Bytes from which a file is uploaded by itself, and named while it is."""


@reporting
def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: Shown = False,
) -> PushResult:
    """Publish a finished artifact on the Hub, with a model card, in one commit.

    Files that are no part of the model stay behind; the model card is written, or the one that is there extended.
    Interrupted, the same call goes on with what is not uploaded yet.

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
        PushResult: `url` (the page), `repo_id`, `revision`, `commit`, `pr_url`, `changed` (False if all was there
            already), `files`, `left_behind`, `removed`, `nbytes`, `seconds`, `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        CheckpointError: The folder is no artifact, or changes meanwhile.
        HubError: The Hub refuses, cannot be reached, or the repository holds something else.

    Example:
        >>> import fossil_export
        >>> fossil_export.push("merged", "user/my-model", private=True).url  # doctest: +SKIP
        'https://huggingface.co/user/my-model'
    """
    started = time.perf_counter()
    plan = plan_files(folder, repo_id, private, revision, create_pr, commit_message)
    return run_push(plan, started=started)


@reporting
def run_push(plan: PushPlan, *, progress: Shown = False, started: float | None = None) -> PushResult:
    """Carry out a plan that `plan_push` made.

    Args:
        plan: What `plan_push` returned.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.
        started: When the clock of `seconds` began, by `time.perf_counter()`. Default: now.

    Returns:
        PushResult: `url` (the page), `repo_id`, `revision`, `commit`, `pr_url`, `changed` (False if all was there
            already), `files`, `left_behind`, `removed`, `nbytes`, `seconds`, `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        CheckpointError: A file has changed since the plan was made.
        HubError: The Hub refuses, cannot be reached, or the repository holds something else.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_push("merged", "user/my-model")  # doctest: +SKIP
        >>> fossil_export.run_push(plan, progress=True)  # doctest: +SKIP
    """
    started = time.perf_counter() if started is None else started
    plan.check()
    repository = Repository(plan.repo_id, plan.revision, plan.create_pr)
    from huggingface_hub import CommitOperationAdd

    parts = plan.parts
    begin(f"opening {plan.repo_id}")
    repository.prepare(plan.private)
    facts, problems = facts_for(parts, repository.repo_id)
    head = repository.head()
    there = repository.files(head)
    # What will be refused is refused before anything is sent.
    refuse_base(facts, repository)
    stale(facts, there)
    problems += [*parts.notes, *repository.validate(card_for(repository, facts, parts.card, head, there)[0])]
    additions = [CommitOperationAdd(name, content) for name, content in contents_of(parts).items()]
    plan.check()  # what was hashed is what was planned
    large = [addition for addition in additions if addition.upload_info.size >= LARGE]
    for addition in sorted(large, key=lambda one: -one.upload_info.size):
        begin(f"uploading {addition.path_in_repo}")
        repository.upload(addition)
    repository.upload(*(addition for addition in additions if addition not in large))
    ends: list[Closing] = []

    def build(head: str, there: Mapping[str, str]) -> Sequence[Operation]:
        ends[:] = [closing(repository, facts, parts.card, additions, head, there)]
        return ends[0].operations

    begin("committing")
    commit = repository.commit(build, plan.title)
    names, removed = (*parts.names, CARD), ends[0].removed
    told = [*repository.notes, *plan.told(problems, ends[0].notes)]
    return PushResult.of(repository, commit, started, names, plan.nbytes, told, removed, parts.left_behind)


@reporting
def push_merged(
    result: MergeResult,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: Shown = False,
) -> PushResult:
    """`push` of a model that was just merged: an error says where it lies, and how to go on without merging again."""
    try:
        return push(
            result.output,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except FossilExportError as problem:
        rest = ["fossil-export push", shlex.quote(str(result.output)), repo_id]
        rest += ["--private"] * private + ["--create-pr"] * create_pr
        rest += ["--revision", shlex.quote(revision)] if revision else []
        rest += ["--commit-message", shlex.quote(commit_message)] if commit_message else []
        more = f" (the merged model is at {result.output}; go on with `{' '.join(rest)}`)"
        raise longer(problem, more) from problem
