"""The one place where what the user typed becomes files: a path, `user/repo[@revision]` or `hf://…`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fossil_export.checkpoints.checkpoint import Checkpoint, hub_revision, open_checkpoint
from fossil_export.checkpoints.folder import Folder, LocalFolder
from fossil_export.errors import FossilExportError, HubError
from fossil_export.storage.hub.errors import NotThereError, check_client, endpoint, redacted

_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")
_OLD_ID = re.compile(r"[\w.-]+(@\S+)?")
# A few of the oldest models have no owner: gpt2, bert-base-uncased.
_URLS = ("hf://", "https://", "http://")


@dataclass(frozen=True)
class Located:
    """What the user named.

    `name` is for records: the id of a model on the Hub, otherwise what was typed, with ./ before what reads as an id.
    `revision` is its commit, where it is known, and `branch` what was typed of it. `path` is where it lies or, on the
    Hub, will lie once `source`, the folder, has fetched it; `file` is the file in it that was meant, None for all.
    """

    name: str
    path: Path
    revision: str | None = None
    source: Folder | None = None
    file: str | None = None
    notes: tuple[str, ...] = ()
    branch: str | None = None

    def fetched(self, names: list[str] | None = None) -> Path:
        """The path, once these files of the folder (default: all, or the one that was meant) are there."""
        if self.source is not None:
            self.source.fetch(names if names is not None else [self.file] if self.file else self.source.names())
        return self.path

    def names(self) -> list[str]:
        """Names of the files in the folder's root."""
        if self.source is not None:
            return self.source.root_names()
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def checkpoint(self) -> Checkpoint:
        """The model that lies there, opened by its headers."""
        with self.by_name():
            return open_checkpoint(self.path if self.source is None else self.source, self.file)

    def shown(self, text: str) -> str:
        """`text` with the name in the place of the folder in the Hub's cache, which is nothing that the user knows."""
        if self.source is None:
            return text
        return text.replace(str(self.source.path), self.name.removesuffix(f"/{self.file}"))

    @contextmanager
    def by_name(self) -> Iterator[None]:
        """Errors in the block are told as `shown` has them."""
        try:
            yield
        except FossilExportError as problem:
            problem.args = (self.shown(str(problem)),)
            raise


def locate(given: str | Path, error: type[FossilExportError], what: str) -> Located:
    """What `given` names; a path that exists wins over a model of that name on the Hub.

    `what` is the word for it in messages ("adapter", "base model"). Raises `error` where there is nothing or it may
    not be read, HubError for what the Hub refuses.
    """
    text = str(given)
    path = expanded(given, error)
    if text.startswith(_URLS):
        return _on_hub(text, error)
    if _exists(path, given, error):
        if not is_hub_id(text):
            return Located(text, path, hub_revision(path))
        note = f"{text}: the {what} in this folder is taken, not the Hub's; write hf://{text} for that one"
        notes = (note,) if isinstance(given, str) else ()
        return Located(f"./{text}", path, hub_revision(path), notes=notes)
    if isinstance(given, str) and (is_hub_id(text) or (what == "base model" and _OLD_ID.fullmatch(text))):
        try:
            return _on_hub(text, error)
        except NotThereError as problem:
            hint = ", or name another base with --base" if what == "base model" else ""
            raise HubError(f"{problem}{hint} (there is no such file or folder here)") from problem
    raise error(_nothing_there(given, what))


def resolve(given: str | Path, error: type[FossilExportError], what: str) -> Path:
    """The local file or folder that `given` names; raises `error` when there is none or it may not be read."""
    path = expanded(given, error)
    if not _exists(path, given, error):
        raise error(_nothing_there(given, what))
    return path


def expanded(given: str | Path, error: type[FossilExportError]) -> Path:
    """`given` with `~` replaced. Raises `error` for a path that cannot be written down or a user that is not there."""
    try:
        str(given).encode()  # it will stand in JSON files
        if given == "":
            raise ValueError("it is empty")
        return Path(given).expanduser()
    except (RuntimeError, ValueError) as problem:
        raise error(f"{str(given)!a}: is no usable path: {problem}") from problem


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `user/repo[@revision]`; a path that exists is looked for before."""
    return _ID.fullmatch(name) is not None and not name.startswith((".", "/", "~"))


def is_old_id(name: str) -> bool:
    """Whether `name` may be a model without an owner, and is no path here."""
    return _OLD_ID.fullmatch(name) is not None and not _is_path(name)


def is_on_hub(name: str | None) -> bool:
    """Whether a record's `name` is a model on the Hub, whatever folders there are here."""
    return name is not None and (name.startswith("hf://") or is_hub_id(name))


def names_hub(name: str | None) -> bool:
    """Whether a name that PEFT or the user wrote, of which a path that exists is one, is of a model on the Hub."""
    return name is not None and is_on_hub(name) and not _is_path(name)


def repository_of(name: str) -> str:
    """The repository's id in a record's `name` on the Hub."""
    user, _, rest = name.removeprefix("hf://").partition("/")
    return f"{user}/{rest.partition('/')[0].partition('@')[0]}"


def folder_of(name: str | None) -> str | None:
    """The folder within the repository in a record's `name` on the Hub, None for the root."""
    if name is None or not name.startswith("hf://"):
        return None
    inside = name.removeprefix("hf://").split("/", 2)[2:]
    folder = inside[0].rpartition("/")[0] if inside and inside[0].endswith(".safetensors") else "".join(inside)
    return folder or None


def pinned(name: str, revision: str | None) -> str:
    """A record's `name` with its commit, so that the same model is read again; a path stays what it is."""
    if revision is None or not is_on_hub(name):
        return name
    if not name.startswith("hf://"):
        return name if "@" in name else f"{name}@{revision}"
    repository = repository_of(name)
    inside = name.removeprefix(f"hf://{repository}")
    return name if inside.startswith("@") else f"hf://{repository}@{revision}{inside}"


def _on_hub(text: str, error: type[FossilExportError]) -> Located:
    check_client()
    from fossil_export.storage.hub.opening import open_repository
    from fossil_export.storage.hub.remote import HubFolder

    repository, revision, inside = _parsed(text, error)
    folder, repository, commit, notes = open_repository(repository, revision)
    if not inside:
        return Located(repository, folder.path, commit, folder, None, notes, revision)
    # Whether the last part is a file or a folder only the listing tells.
    names = folder.names()
    parent, _, last = inside.rpartition("/")
    is_file = inside in names
    if not is_file and not any(name.startswith(f"{inside}/") for name in names):
        raise HubError(
            f"{repository}: has no {inside} at {commit[:12]}; see its files at {endpoint()}/{repository}/tree/main"
        )
    within = parent if is_file else inside
    if within:
        folder = folder.within(within) if isinstance(folder, HubFolder) else LocalFolder(folder.path / within)
    file = last if is_file else None
    return Located(f"hf://{repository}/{inside}", folder.path / (file or ""), commit, folder, file, notes, revision)


def _parsed(text: str, error: type[FossilExportError]) -> tuple[str, str | None, str]:
    """Repository, revision and path within it."""
    if not text.startswith(_URLS):
        repository, _, revision = text.partition("@")
        return repository, revision or None, ""
    from huggingface_hub import constants, parse_hf_uri

    try:
        uri = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except ValueError as problem:
        why = " ".join(str(getattr(problem, "msg", problem)).split()).rstrip(".")
        shown = redacted(text)
        raise error(f"{shown}: is no address of a model ({why}); write hf://user/repo[@revision][/folder]") from problem
    if uri.type != "model":
        raise error(f"{text}: is a {uri.type}, not a model; write hf://user/repo[@revision][/folder]")
    return uri.id, uri.revision, uri.path_in_repo.strip("/")


def _exists(path: Path, given: str | Path, error: type[FossilExportError]) -> bool:
    """Raises `error` for a path that exists and may not be read."""
    try:
        found = path.exists()
        readable = not found or os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
    except (OSError, ValueError) as problem:
        raise error(f"{given}: is no usable path: {problem}") from problem
    if not readable:
        raise error(f"{given}: cannot be read: Permission denied; change its permissions")
    return found


def _is_path(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _nothing_there(given: str | Path, what: str) -> str:
    option = " with --base" if what == "base model" else ""
    return f"{given}: no such file or folder; download the {what} and name its folder{option}"
