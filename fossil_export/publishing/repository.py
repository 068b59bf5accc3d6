"""The repository on the Hub that is written to: uploads first, then everything in one commit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fossil_export.errors import FossilExportError, HubError, listed
from fossil_export.publishing.operations import Copy, Operation, digest_of, for_client, name_of
from fossil_export.publishing.questions import held, said_of_card
from fossil_export.publishing.refusals import is_copy_refusal, is_damaged, why_not_copied
from fossil_export.storage.hub import client, errors
from fossil_export.storage.hub.errors import (
    ATTEMPTS,
    check_client,
    endpoint,
    explained,
    is_conflict,
    is_transient,
    retried,
)

T = TypeVar("T")

STALL = 600.0
"""Seconds after which a connection on which nothing moves is given up, and the request repeated."""

_BATCH = 256
"""Files asked about in one request, as the client does."""


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
    """The Hub does not copy these files from one repository to the other; the message is why, in a few words."""


Build = Callable[[str, Mapping[str, str]], Sequence[Operation]]
"""From a commit and what it holds (names to hashes) to what is to be done on top of it."""


class Repository:
    """A model repository, of which one branch (default: main) or a pull request takes the commit."""

    def __init__(self, repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
        check_client()
        client.check_additions()
        from huggingface_hub import HfApi, get_session
        from huggingface_hub.utils import validate_repo_id

        get_session().timeout = STALL  # the client's own uploads would wait for ever
        try:
            validate_repo_id(repo_id)
        except ValueError as problem:
            where = "; a branch goes into --revision" if "@" in repo_id else ""
            raise HubError(
                f"{repo_id}: is no name of a repository on the Hub; write user/name, in letters, digits, '-', '_' and "
                f"'.' (no '--' or '..', none of them at the ends){where}"
            ) from problem
        self.repo_id = repo_id
        self.revision = revision or None
        self.create_pr = create_pr
        self.notes: list[str] = []
        self._api = HfApi(library_name="fossil-export")

    @property
    def page(self) -> str:
        """Where to look at what is published."""
        page = f"{endpoint()}/{self.repo_id}"
        return page if self.revision is None else f"{page}/tree/{quote(self.revision, safe='')}"

    def prepare(self, private: bool = False) -> None:
        """See that repository and branch exist and may be written to, and make them. `private` is for a new one."""
        self._online()

        def run() -> bool:
            if "/" not in self.repo_id or not self._api.repo_exists(self.repo_id):
                self.repo_id = self._api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            elif not self.create_pr:
                self._api.auth_check(self.repo_id, write=True)
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            info = self._api.model_info(self.repo_id)
            self.repo_id = str(info.id or self.repo_id)  # it may have been renamed
            return private and not info.private

        if self._opened(run):
            self.notes.append(f"{self.repo_id}: exists already and stays public; --private is for a new one")

    def check(self) -> None:
        """See that repository and branch exist and may be written to; makes neither."""
        self._online()

        def run() -> list[str]:
            if not self.create_pr:
                self._api.auth_check(self.repo_id, write=True)
            refs = self._api.list_repo_refs(self.repo_id, include_pull_requests=True)
            return [ref.name for ref in refs.branches] + [ref.ref for ref in refs.pull_requests or []]

        if self.revision not in (None, *self._opened(run)):
            raise HubError(
                f"{self.repo_id}: has no branch {self.revision}; a commit or a tag takes nothing, name a branch"
            )

    def _opened(self, run: Callable[[], T]) -> T:
        try:
            return retried(run, self.repo_id, "opening it")
        except HubError as problem:
            cause = problem.__cause__
            if cause is None or self.create_pr or 403 not in map(errors.status_of, errors.causes_of(cause)):
                raise
            raise HubError(f"{problem}; or open a pull request with --create-pr") from cause

    def _online(self) -> None:
        from huggingface_hub import constants

        if constants.is_offline_mode():
            raise HubError(f"{self.repo_id}: HF_HUB_OFFLINE is set; unset it to publish")

    def head(self) -> str:
        """The commit that the branch is at."""
        return retried(
            lambda: str(self._api.model_info(self.repo_id, revision=self.revision).sha), self.repo_id, "opening it"
        )

    def files(self, revision: str) -> dict[str, str]:
        """What is there: name to SHA-256 (large files) or git's SHA-1."""

        def run() -> dict[str, str]:
            listing = self._api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            return {
                file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id
                for file in listing
                if hasattr(file, "blob_id")
            }

        return retried(run, self.repo_id, "listing it")

    def read(self, name: str, commit: str) -> str:
        """A small text file at a commit, with its own line ends. Raises HubError, also where it is not there."""
        from huggingface_hub import hf_hub_download

        path = retried(lambda: hf_hub_download(self.repo_id, name, revision=commit), self.repo_id, f"reading {name}")
        try:
            return Path(path).read_bytes().decode()
        except UnicodeDecodeError as problem:
            raise HubError(f"{self.repo_id}: {name} is not UTF-8; save it as that") from problem

    def validate(self, card: bytes) -> list[str]:
        """What the Hub has to say against the metadata of a card. Raises HubError where it would refuse it."""
        refused, warned = retried(lambda: said_of_card(card.decode()), self.repo_id, "checking its card")
        if refused:
            why = "; ".join(refused)
            raise HubError(f"{self.repo_id}: the Hub refuses README.md's metadata: {why}; correct it")
        return [f"the Hub says of README.md's metadata: {'; '.join(warned)}"] if warned else []

    def upload(self, *additions: Any) -> None:
        """Bring the content of large files to the Hub, where no commit shows it yet; small ones go with the commit.

        `additions` are CommitOperationAdd. What the Hub has already is not sent again.
        """
        doing = f"uploading {listed([addition.path_in_repo for addition in additions])}"

        def run() -> None:
            self._api.preupload_lfs_files(
                self.repo_id,
                list(additions),
                revision=self.revision,
                create_pr=self.create_pr or None,
                free_memory=False,
            )

        for again in (False, True):
            try:
                retried(run, self.repo_id, doing)
                break
            except HubError as problem:
                cause = problem.__cause__
                if isinstance(cause, ValueError) and str(cause).startswith("LFS batch"):  # the reason is further below
                    said = errors.redacted(" ".join(str(cause).split()))
                    raise HubError(f"{self.repo_id}: {doing}: {said}; run the same command again") from cause
                if not is_damaged(problem):
                    raise
                if again:
                    raise HubError(
                        f"{self.repo_id}: {doing}: arrived damaged twice; run the same command again later"
                    ) from problem
        if ignored := [addition.path_in_repo for addition in additions if client.is_ignored(addition)]:
            raise HubError(
                f"{self.repo_id}: its .gitignore leaves out {listed(ignored)}; change it, then run the command again"
            )

    def holds(self, uploads: Iterable[Any]) -> set[str]:
        """SHA-256 of those contents (UploadInfo) that the Hub has for this repository."""
        wanted = list(uploads)
        # Whoever opens a pull request need not be allowed to write to the branch.
        branch = None if self.create_pr else self.revision or "main"
        found: set[str] = set()
        for start in range(0, len(wanted), _BATCH):
            some = wanted[start : start + _BATCH]
            ask = partial(held, self.repo_id, some, branch)
            found |= retried(ask, self.repo_id, "asking what it holds")
        return found

    def commit(self, build: Build, message: str) -> Commit:
        """One commit of what `build` gives, held against what the Hub then lists; `build` is asked again where the
        branch has moved meanwhile.

        A commit whose answer was lost is recognised by its files. Raises CopyRefusedError where only the copies
        are in the way, HubError otherwise.
        """
        pause = errors.PAUSE
        for attempt in range(ATTEMPTS):
            # All that is decided is decided for this commit, and nothing is put on top of any other.
            head = self.head()
            there = self.files(head)
            operations = build(head, there)
            expected = {name_of(operation): digest_of(operation) for operation in operations}
            pending = [one for one in operations if there.get(name_of(one)) != expected[name_of(one)]]
            if not pending:
                return Commit(head, f"{endpoint()}/{self.repo_id}/commit/{head}", None, False)
            try:
                commit = self._send(pending, head, message)
            except Exception as problem:
                if any(isinstance(one, Copy) for one in pending) and is_copy_refusal(problem):
                    raise CopyRefusedError(why_not_copied(problem)) from problem
                if not (is_conflict(problem) or is_transient(problem)):
                    raise explained(problem, self.repo_id, "committing") from problem
                landed = self._landed(expected, head, message)
                if landed is None:
                    wait = max(pause, errors.asked_pause(problem))
                    if attempt == ATTEMPTS - 1 or wait > errors.PATIENCE:
                        raise explained(problem, self.repo_id, "committing") from problem
                    time.sleep(wait)
                    pause *= 2
                    continue
                commit = landed
            self._check(commit, expected)
            return commit
        raise AssertionError("unreachable")

    def _send(self, operations: Iterable[Operation], head: str, message: str) -> Commit:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the card, which `validate` tells
            info = self._api.create_commit(
                self.repo_id,
                [for_client(operation, self.repo_id) for operation in operations],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr or None,
                parent_commit=head,
            )
        return Commit(info.oid, info.commit_url, info.pr_url, True)

    def _landed(self, expected: Mapping[str, str | None], head: str, message: str) -> Commit | None:
        """The commit that was made although no answer came."""
        if not self.create_pr:
            now = self.head()
            if now == head or self._differing(now, expected):
                return None
            return Commit(now, f"{endpoint()}/{self.repo_id}/commit/{now}", None, True)

        def run() -> list[Any]:
            found = self._api.get_repo_discussions(
                self.repo_id, discussion_type="pull_request", discussion_status="open"
            )
            return [pull for pull in found if pull.title == message]

        for pull in retried(run, self.repo_id, "listing its pull requests"):
            if not self._differing(f"refs/pr/{pull.num}", expected):
                page = f"{endpoint()}/{self.repo_id}/discussions/{pull.num}"
                oid = str(self._api.model_info(self.repo_id, revision=f"refs/pr/{pull.num}").sha)
                return Commit(oid, page, page, True)
        return None

    def _differing(self, revision: str, expected: Mapping[str, str | None]) -> list[str]:
        """Names of files that are not what is expected (None: gone) at a revision."""
        found = self.files(revision)
        return [name for name, digest in expected.items() if found.get(name) != digest]

    def _check(self, commit: Commit, expected: Mapping[str, str | None]) -> None:
        """Hold what is published against the hashes of what was meant. Raises HubError."""
        revision = commit.oid
        if commit.pr_url is not None:
            revision = f"refs/pr/{commit.pr_url.rstrip('/').rpartition('/')[2]}"
        if wrong := self._differing(revision, expected):
            raise HubError(f"{self.repo_id}: {listed(wrong)} is not what was uploaded; run the same command again")
