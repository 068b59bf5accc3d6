"""The repository on the Hub that a commit is for, as far as it is asked: nothing is made here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fossil_export.errors import HubError
from fossil_export.publishing._questions import held, refuse_owner, said_of_card
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub import _errors as errors
from fossil_export.storage.hub._errors import check_client, endpoint, retried

T = TypeVar("T")

STALL = 600.0
"""Seconds after which a connection on which nothing moves is given up, and the request repeated."""

_BATCH = 256
"""Files asked about in one request, as the client does."""


class Target:
    """A model repository, of which one branch (default: main) or a pull request takes the commit."""

    def __init__(self, repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
        check_client()
        client.check_publishing()
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
        self._api = HfApi(library_name=client.LIBRARY)

    @property
    def page(self) -> str:
        """Where to look at what is published."""
        page = f"{endpoint()}/{self.repo_id}"
        return page if self.revision is None else f"{page}/tree/{quote(self.revision, safe='')}"

    def find(self, private: bool = False) -> bool:
        """Whether it exists, as far as one may know. Its name is then the whole one, as it is today."""
        self._online()

        def run() -> bool:
            if "/" not in self.repo_id:
                self.repo_id = f"{self._who()['name']}/{self.repo_id}"
            if not self._api.repo_exists(self.repo_id):
                return False
            info = self._api.model_info(self.repo_id)
            self.repo_id = str(info.id or self.repo_id)
            if private and not info.private:
                self.note_public()
            return True

        return retried(run, self.repo_id, "looking for it")

    def note_public(self) -> None:
        """Note that asking for a private repository came too late."""
        self.notes.append(f"{self.repo_id}: exists already and stays public; --private is for a new one")

    def head_below(self) -> str:
        """The commit that a commit would be on top of: the branch's, or main's if the branch is still to be made."""

        def run() -> str:
            refs = self._api.list_repo_refs(self.repo_id)
            is_there = self.revision in [ref.name for ref in refs.branches] or (self.revision or "").startswith("refs/")
            return str(self._api.model_info(self.repo_id, revision=self.revision if is_there else None).sha)

        return retried(run, self.repo_id, "looking into it")

    def foresee(self) -> bool:
        """Raise HubError for what would stop a commit, as far as one can know it without making anything: the Hub is
        out of reach, or one may not write there. Gives whether the repository exists."""
        exists = self.find()
        self.check_writing(exists)
        return exists

    def check_writing(self, exists: bool) -> None:
        """Raise HubError unless one is known to the Hub and may write to the repository, or make it."""

        def run() -> None:
            if not exists:
                refuse_owner(self.repo_id, self._who())
            elif self.create_pr:
                self._who()
            else:
                self._may_write()

        self._hinted(run, "asking for permission")

    def check(self) -> None:
        """See that repository and branch exist and may be written to; makes neither."""
        self._online()

        def run() -> list[str]:
            if self.create_pr:
                self._who()
            else:
                self._may_write()
            refs = self._api.list_repo_refs(self.repo_id, include_pull_requests=True)
            return [ref.name for ref in refs.branches] + [ref.ref for ref in refs.pull_requests or []]

        if self.revision not in (None, *self._hinted(run, "opening the repository")):
            raise HubError(
                f"{self.repo_id}: has no branch {self.revision}; a commit or a tag takes nothing, name a branch"
            )

    def head(self) -> str:
        """The commit that the branch is at."""
        return retried(
            lambda: str(self._api.model_info(self.repo_id, revision=self.revision).sha),
            self.repo_id,
            "opening the repository",
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

        def run() -> str:
            return str(hf_hub_download(self.repo_id, name, revision=commit, library_name=client.LIBRARY))

        path = retried(run, self.repo_id, f"reading {name}")
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

    def _who(self) -> dict[str, Any]:
        """Whose token it is; the Hub lets one ask this only seldom."""
        return dict(self._api.whoami(cache=True))

    def _may_write(self) -> None:
        """Raise the client's error for who may not. Of a Hub that cannot be asked this, the requests that follow tell
        it, before anything is sent."""
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        try:
            self._api.auth_check(self.repo_id, write=True)
        except (GatedRepoError, RepositoryNotFoundError):
            raise
        except HfHubHTTPError as problem:
            if errors.status_of(problem) not in (404, 405, 501):
                raise

    def _hinted(self, run: Callable[[], T], doing: str) -> T:
        try:
            return retried(run, self.repo_id, doing)
        except HubError as problem:
            cause = problem.__cause__
            if cause is None or self.create_pr or 403 not in map(errors.status_of, errors.causes_of(cause)):
                raise
            raise HubError(f"{problem}; or open a pull request with --create-pr") from cause

    def _online(self) -> None:
        from huggingface_hub import constants

        if constants.is_offline_mode():
            raise HubError(f"{self.repo_id}: HF_HUB_OFFLINE is set; unset it to publish")
