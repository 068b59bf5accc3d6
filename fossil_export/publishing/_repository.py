"""The repository on the Hub that is written to: uploads first, then everything in one commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fossil_export.errors import FossilExportError, HubError, listed
from fossil_export.publishing._operations import Copy, Operation, digest_of, for_client, name_of
from fossil_export.publishing._refusals import is_copy_refusal, is_damaged, why_not_copied
from fossil_export.publishing._target import Target
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub import _errors as errors
from fossil_export.storage.hub import _limits as limits
from fossil_export.storage.hub._errors import (
    endpoint,
    explained,
    is_conflict,
    is_transient,
    retried,
)


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


class Repository(Target):
    """The same, made and written to."""

    def prepare(self, private: bool = False) -> None:
        """See that repository and branch exist and may be written to, and make them. `private` is for a new one."""
        self._online()

        def run() -> bool:
            if "/" not in self.repo_id or not self._api.repo_exists(self.repo_id):
                self.repo_id = self._api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            elif not self.create_pr:
                self._may_write()
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            info = self._api.model_info(self.repo_id)
            self.repo_id = str(info.id or self.repo_id)  # it may have been renamed
            return private and not info.private

        if self._hinted(run, "opening the repository"):
            self.note_public()

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
        if ignored := self._left_out(additions):
            raise HubError(
                f"{self.repo_id}: its .gitignore leaves out {listed(ignored)}; change it, then run the command again"
            )

    def _left_out(self, additions: Iterable[Any]) -> list[str]:
        """Names of the files that a commit would leave out, for the repository's .gitignore. Other Hubs call what the
        branch holds already so, too, and of that the commit sends nothing."""
        ignored = [addition for addition in additions if client.is_ignored(addition)]
        there = self.files(self.revision or "main") if ignored else {}
        return [one.path_in_repo for one in ignored if there.get(one.path_in_repo) != digest_of(one)]

    def commit(self, build: Build, message: str) -> Commit:
        """One commit of what `build` gives, held against what the Hub then lists; `build` is asked again where the
        branch has moved meanwhile.

        A commit whose answer was lost is recognised by its files. Raises CopyRefusedError where only the copies
        are in the way, HubError otherwise.
        """
        trouble = errors.Trouble()
        while True:
            # All that is decided is decided for this commit, and nothing is put on top of any other.
            head = self.head()
            there = self.files(head)
            operations = build(head, there)
            expected = {name_of(operation): digest_of(operation) for operation in operations}
            pending = [one for one in operations if there.get(name_of(one)) != expected[name_of(one)]]
            if not pending:
                return Commit(head, f"{endpoint()}/{self.repo_id}/commit/{head}", None, False)
            limits.notice()
            try:
                commit = self._send(pending, head, message)
            except Exception as problem:
                if any(isinstance(one, Copy) for one in pending) and is_copy_refusal(problem):
                    raise CopyRefusedError(why_not_copied(problem)) from problem
                if not (is_conflict(problem) or is_transient(problem)):
                    raise explained(problem, self.repo_id, "committing") from problem
                landed = self._landed(expected, head, message)
                if landed is None:
                    if not trouble.may_go_on(problem):
                        raise explained(problem, self.repo_id, "committing") from problem
                    trouble.rest()
                    continue
                commit = landed
            self._check(commit, expected)
            return commit

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
