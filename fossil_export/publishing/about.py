"""What the model card says, gathered from the artifact's records and the base's own card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fossil_export.checkpoints.companions import CARD
from fossil_export.hub.errors import explained
from fossil_export.hub.resolve import is_on_hub, repository_of
from fossil_export.publishing.card import Facts


def facts_of(
    repo_id: str,
    kind: str,
    files: tuple[str, ...],
    record: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> tuple[Facts, list[str]]:
    """What is known of an artifact that goes to `repo_id`, and what could not be found out."""
    base, adapter = dict((record or {}).get("base") or {}), dict((record or {}).get("adapter") or {})
    if not base.get("name") and config is not None:  # an adapter as PEFT saved it
        base = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    metadata, problems = _base_card(base.get("name"), base.get("revision"))
    on_hub = is_on_hub(base.get("name"))
    adapter_on_hub = is_on_hub(adapter.get("name"))
    facts = Facts(
        repo_id=repo_id,
        kind=kind,
        files=files,
        record=record,
        certificate=certificate,
        config=config,
        base=repository_of(base["name"]) if on_hub else None,
        base_revision=base.get("revision") if on_hub else None,
        adapter=repository_of(adapter["name"]) if adapter_on_hub else None,
        adapter_revision=adapter.get("revision") if adapter_on_hub else None,
        base_card=metadata,
    )
    return facts, problems


def _base_card(name: str | None, revision: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The metadata of the base's card, from its folder here or from the Hub."""
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError

    if not name:
        return None, []
    if not is_on_hub(name):
        path = Path(name).expanduser()
        path = (path if path.is_dir() else path.parent) / CARD
        if not path.is_file():
            return None, []
    else:
        repository = repository_of(name)
        try:
            path = Path(hf_hub_download(repository, CARD, revision=revision))
        except EntryNotFoundError:
            return {}, []
        except Exception as problem:
            return None, [f"the base's card was not read: {explained(problem, repository)}"]
    try:
        return dict(metadata_load(path) or {}), []
    except Exception as problem:  # whatever YAML makes of it
        why = next(iter(str(problem).splitlines()), "")
        return None, [f"{path}: its metadata cannot be read ({why})"]
