"""From a model's name to its folder at one commit: on the Hub, or the copy in the Hub's cache."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.errors import HubError
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._errors import ATTEMPTS, NOT_CACHED, NotThereError, explained, is_unreachable, retried
from fossil_export.storage.hub._remote import Entry, HubFolder, storage_of
from fossil_export.writing._single_file import write_file

_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_repository(repository: str, revision: str | None) -> tuple[HubFolder | LocalFolder, str, str, tuple[str, ...]]:
    """The folder of a model on the Hub, the model's full name, the commit that `revision` (default: main) is, and
    what to tell the user.

    Without a connection, or with HF_HUB_OFFLINE, it is the copy in the cache. Raises HubError.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name=client.LIBRARY)
    try:
        cached = _cached(repository, revision)
    except ValueError as problem:
        raise explained(problem, repository) from problem
    if client.is_offline():
        if cached is None:
            raise NotThereError(f"{repository}: {NOT_CACHED}")
        folder, commit, notes = cached
        return folder, repository, commit, notes
    attempts = ATTEMPTS if cached is None else 2
    try:
        info = retried(
            lambda: api.model_info(repository, revision=revision, timeout=constants.DEFAULT_REQUEST_TIMEOUT),
            repository,
            attempts=attempts,
        )
        commit = str(info.sha)
        asked, repository = repository, str(info.id or repository)
        # The client repeats this one by itself from 2.0 on.
        listing = retried(
            lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)),
            repository,
            attempts=min(attempts, 3),
        )
    except HubError as problem:
        if cached is None or not is_unreachable(problem):
            raise
        folder, commit, notes = cached
        why = str(problem).removeprefix(f"{repository}: ").partition(";")[0]
        taken = f"{repository}: the copy in the Hub's cache is taken, of commit {commit[:12]}, since {why}"
        return folder, repository, commit, (taken, *notes)
    entries = {
        file.path: Entry(file.size, file.lfs.sha256 if file.lfs is not None else file.blob_id)
        for file in listing
        if hasattr(file, "size")
    }
    _remember(repository, revision, commit)
    moved = asked != repository and "/" in asked  # the oldest models have all moved below an owner
    notes = (f"{asked}: is called {repository} on the Hub, and is recorded as that",) if moved else ()
    return HubFolder(repository, commit, entries), repository, commit, notes


def _cached(repository: str, revision: str | None) -> tuple[HubFolder | LocalFolder, str, tuple[str, ...]] | None:
    """The copy in the cache, its commit, and what to tell of it; None where there is none."""
    storage = storage_of(repository)
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (storage / "refs" / commit).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    snapshot = storage / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    listing = client.listing(repository, commit)
    if listing is None:
        note = f"{repository}: is taken as it lies in the Hub's cache, where nothing tells whether that is all of it"
        return LocalFolder(snapshot), commit, (note,)
    entries = {file.path: Entry(file.size, "") for file in listing}  # it has no hashes of large files
    return HubFolder(repository, commit, entries), commit, ()


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of the model `name` in the Hub's cache, at its root; None if it is not there."""
    repository, _, typed = name.removeprefix("hf://").partition("@")
    commit = revision or typed or "main"
    try:
        storage = storage_of(repository)
        if not _COMMIT.fullmatch(commit):
            commit = (storage / "refs" / commit).read_text().strip()
        path = storage / "snapshots" / commit / file
        return path if path.is_file() else None
    except (OSError, ValueError):
        return None


def _remember(repository: str, revision: str | None, commit: str) -> None:
    """Note in the cache which commit a branch is at, for when the Hub is out of reach."""
    if revision == commit:
        return
    path = storage_of(repository) / "refs" / (revision or "main")
    with suppress(OSError):  # the cache may be read-only
        if path.is_file() and path.read_text() == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, commit.encode())
