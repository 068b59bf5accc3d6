"""From what the user typed to a folder on the Hub: `user/repo[@revision]`, `hf://…` or the address of a page."""

from __future__ import annotations

from pathlib import Path

from fossil_export.errors import FossilExportError, HubError
from fossil_export.storage._origin import ModelName, Origin, Storage
from fossil_export.storage._paths import near_to
from fossil_export.storage.hub import _address as address
from fossil_export.storage.hub._errors import NotThereError, check_client, endpoint, is_cut_off
from fossil_export.storage.hub._names import folder_of, is_hub_id, is_old_id, is_on_hub, repository_of


class HubStorage(Storage):
    """The Hub, or the copies in its cache."""

    addresses = ("hf://", "https://", "http://")

    def find(self, given: str | Path, error: type[FossilExportError], what: str) -> Origin | None:
        """Raises HubError for what the Hub refuses, `error` for an address of something else."""
        text = str(given)
        if text.startswith(self.addresses):
            return _open(text, error)
        if isinstance(given, Path) or not (is_hub_id(text) or (what == "base model" and is_old_id(text))):
            return None
        try:
            return _open(text, error)
        except HubError as problem:
            if not isinstance(problem, NotThereError) and not is_cut_off(problem):
                raise
            raise HubError(_nowhere(text, str(problem), what)) from problem

    def parse(self, name: str) -> ModelName | None:
        if not is_on_hub(name):
            return None
        repository = repository_of(name)
        # Of an id without hf:// PEFT is told what was typed.
        known = repository if name.startswith("hf://") else name
        return ModelName(known, folder_of(name), _page(repository))

    def pinned(self, name: str, revision: str) -> str:
        if not name.startswith("hf://"):
            return name if "@" in name else f"{name}@{revision}"
        repository = repository_of(name)
        inside = name.removeprefix(f"hf://{repository}")
        return name if inside.startswith("@") else f"hf://{repository}@{revision}{inside}"


def _nowhere(text: str, told: str, what: str) -> str:
    """The line for a name that is no path here, and that the Hub does not know or cannot be asked for: `told`."""
    repository = text.partition("@")[0]
    told = told.removeprefix(f"{repository}: ")
    near = near_to(text)
    meant = f" (did you mean {near}?)" if near else ""
    hint = ", or name another base with --base" if what == "base model" else ""
    it = "it " if told.startswith("is ") else ""
    return f"{repository}: no such file or folder here{meant}, and {it}{told}{hint}"


def _page(repository: str) -> str | None:
    try:
        return f"{endpoint()}/{repository}"
    except ValueError:  # the client refuses its settings, which are none of the caller's business
        return None


def _open(text: str, error: type[FossilExportError]) -> Origin:
    check_client()
    from fossil_export.storage.hub._opening import open_repository

    repository, revision, inside = _parsed(text, error)
    folder, repository, commit, notes = open_repository(repository, revision)
    if not inside:
        return Origin(repository, folder, None, commit, revision, notes)
    # Whether the last part is a file or a folder only the listing tells.
    names = folder.names()
    parent, _, last = inside.rpartition("/")
    is_file = inside in names
    if not is_file and not any(name.startswith(f"{inside}/") for name in names):
        raise HubError(
            f"{repository}: has no {inside} at {commit[:12]}; see its files at {endpoint()}/{repository}/tree/main"
        )
    if within := parent if is_file else inside:
        folder = folder.within(within)
    return Origin(f"hf://{repository}/{inside}", folder, last if is_file else None, commit, revision, notes)


def _parsed(text: str, error: type[FossilExportError]) -> tuple[str, str | None, str]:
    """Repository, revision and path within it."""
    if not text.startswith(HubStorage.addresses):
        repository, _, revision = text.partition("@")
        return repository, revision or None, ""
    kind, repository, told, inside = address.parsed(text, error)
    if kind != "model":
        raise error(f"{text}: is a {kind}, not a model; write hf://user/repo[@revision][/folder]")
    return repository, told, inside
