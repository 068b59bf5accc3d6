"""What the model card says, gathered from the artifact's records, the base's own card and the one that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fossil_export.artifacts._kinds import kind_named
from fossil_export.cards import Facts, model_card, warnings
from fossil_export.cards._facts import adapters_of, part
from fossil_export.cards._frontmatter import MARKED, is_template, read_card
from fossil_export.checkpoints._companions import CARD
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import CheckpointError, FossilExportError, HubError
from fossil_export.publishing._target import Target
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._errors import endpoint, retried
from fossil_export.storage.hub._names import folder_of, is_old_id, is_on_hub, names_hub, repository_of

_TOKENIZER = "tokenizer_config.json"
_MACHINES = {"base_model", "library_name", "tags"}
"""Metadata that trainers and `convert` write too."""


def facts_of(
    repo_id: str,
    kind: str,
    files: tuple[str, ...],
    record: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    chats: bool | None = None,
) -> tuple[Facts, list[str]]:
    """What is known of an artifact that goes to `repo_id`, and what could not be found out."""
    base, entries = part(record, "base"), adapters_of(record)
    adapters = tuple(repository_of(entry["name"]) if _is_on_hub(entry, True) else None for entry in entries)
    adapter = adapters[0] if len(adapters) == 1 else None
    on_hub = _is_on_hub(base, _has_commit(record))
    if not base.get("name") and config is not None:  # an adapter as PEFT saved it
        base = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
        on_hub = isinstance(base["name"], str) and names_hub(base["name"])
        if not on_hub and (found := _old_id(base["name"], base["revision"])):
            base, on_hub = {**base, "name": found}, True
    metadata, problems = _card_of("base", base.get("name"), base.get("revision"), on_hub)
    license = (metadata or {}).get("license")  # noqa: A001
    for entry, found in zip(entries, adapters, strict=True):
        others, more = _card_of("adapter", entry.get("name"), entry.get("revision"), found is not None)
        problems += more
        if (other := (others or {}).get("license")) not in (None, license):
            named = f"the card names the base's, {license}" if license else "the card names none"
            problems.append(f"the adapter's license is {other}; {named}: see that both are kept")
    facts = Facts(
        repo_id=repo_id,
        kind=kind,
        files=files,
        record=record,
        certificate=certificate,
        config=config,
        base=repository_of(base["name"]) if on_hub else None,
        base_revision=base.get("revision") if on_hub else None,
        adapter=adapter,
        adapter_revision=entries[0].get("revision") if adapter is not None else None,
        base_card=metadata,
        base_folder=folder_of(base.get("name")) if on_hub else None,
        hub=endpoint(),
        adapters=adapters if len(adapters) > 1 else (),
        chats=chats,
    )
    return facts, problems


def holds_template(files: Mapping[str, Path]) -> bool | None:
    """Whether the chat template is in tokenizer_config.json, as older ones have it; None if that cannot be told.

    `files` are those of the model that are on this machine.
    """
    try:
        return bool(read_json(files[_TOKENIZER], CheckpointError).get("chat_template"))
    except (KeyError, CheckpointError):
        return None


def local_names(
    record: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """What records and config call base and adapter where these are not on the Hub."""
    adapters = adapters_of(record)
    for entry, has_commit in ((part(record, "base"), _has_commit(record)), *((entry, True) for entry in adapters)):
        if isinstance(entry.get("name"), str) and not _is_on_hub(entry, has_commit):
            yield entry["name"]
    ours = [(certificate or {}).get("base"), *(entry.get("name") for entry in adapters_of(certificate))]
    yield from (name for name in ours if isinstance(name, str) and name and not is_on_hub(name))
    # These are PEFT's words, which may mean a folder here.
    others = {*(entry.get("base_model") for entry in adapters), (config or {}).get("base_model_name_or_path")}
    others -= {part(record, "base").get("name")}
    yield from (name for name in others if isinstance(name, str) and name and not names_hub(name))


def card_for(
    repository: Target, facts: Facts, own: str | None, head: str, there: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The card, and what to say of it, for a commit on top of `head`, which holds the files `there`.

    It extends `own`, the card in the folder, where the user has written in it, else the one that is there.
    """
    return extended_card(facts, own, repository.read(CARD, head) if CARD in there else None)


def extended_card(facts: Facts, own: str | None, found: str | None) -> tuple[bytes, list[str]]:
    """The same, if the repository has the card `found`. Raises HubError if that cannot be read."""
    words = _words(own)
    try:
        others = _words(found)
    except FossilExportError as problem:
        raise HubError(f"{facts.repo_id}: {problem}") from problem
    notes = []
    if found is None or words or (own is not None and not others and _has_metadata(own)):
        existing = own
        if others and others != words:
            notes.append(f"{facts.repo_id}: its README.md gave way to the folder's; its history still has it")
    else:
        existing = found
        if own is not None and _has_metadata(own):
            notes.append(f"the metadata of the folder's README.md was not taken: {facts.repo_id} has a card with text")
    return model_card(facts, existing).encode(), [*notes, *warnings(facts, existing)]


def _words(card: str | None) -> list[str]:
    """The lines of a card that are neither metadata nor headings nor written by a program."""
    text = read_card(card)[1]
    if is_template(text):
        return []
    return [line.strip() for line in MARKED.sub("", text).splitlines() if line.strip() and not line.startswith("# ")]


def _has_metadata(card: str) -> bool:
    """Whether its metadata is more than programs write."""
    _, text, data = read_card(card)
    return bool(data.keys() - _MACHINES) and not is_template(text)


def _old_id(name: Any, revision: Any) -> str | None:
    """The id that one of the oldest models, such as gpt2, has today."""
    from fossil_export.storage.hub._opening import open_repository

    if not isinstance(name, str) or not is_old_id(name):
        return None
    try:
        return open_repository(name, revision if isinstance(revision, str) else None)[1]
    except HubError:
        return None


def _has_commit(record: Mapping[str, Any] | None) -> bool:
    """Whether the record of such an artifact has the base's commit if the base was on the Hub."""
    kind = kind_named((record or {}).get("artifact"))
    return kind is not None and kind.whole


def _is_on_hub(entry: Mapping[str, Any], has_commit: bool) -> bool:
    """Whether an entry of a record is of a model on the Hub, which, if it `has_commit`, one without is not."""
    name = entry.get("name")
    return isinstance(name, str) and is_on_hub(name) and (entry.get("revision") is not None or not has_commit)


def _card_of(what: str, name: Any, revision: str | None, on_hub: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """The metadata of the card of base or adapter, from its folder here or from the Hub."""
    from huggingface_hub import hf_hub_download, metadata_load

    if not isinstance(name, str) or not name:
        return None, []
    if on_hub:
        repository = repository_of(name)

        def run() -> str | None:
            try:
                return str(hf_hub_download(repository, CARD, revision=revision, library_name=client.LIBRARY))
            except Exception as problem:
                if client.is_missing_file(problem):
                    return None
                raise

        try:
            fetched = retried(run, repository)
        except HubError as problem:
            return None, [f"the {what}'s card was not read: {problem}"]
        if fetched is None:
            return {}, []
        path = Path(fetched)
    else:
        try:
            given = Path(name).expanduser()
            path = (given.parent if given.is_file() else given) / CARD
            if not path.is_file():
                return None, []
        except (RuntimeError, OSError):
            return None, []
    try:
        return dict(metadata_load(path) or {}), []
    except Exception as problem:  # whatever YAML makes of it
        why = next(iter(str(problem).splitlines()), "")
        return None, [f"{path}: its metadata cannot be read ({why})"]
