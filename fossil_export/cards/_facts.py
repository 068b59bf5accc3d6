"""What is known of an artifact when its model card is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_PARTS = ("adapter", "base")


@dataclass(frozen=True)
class Facts:
    """What is known of an artifact. `base` and `adapter` are ids on the Hub, None for what is not there: the path
    of a folder is never published. If several adapters were added, `adapters` has that of each. `files` are the names
    of what is published; `config` is config.json or adapter_config.json, `base_card` the metadata of the base's
    README.md, `base_folder` its folder in its repository, None for the root. `hub` is the Hub's address, for links.
    `chats`: whether tokenizer_config.json holds a chat template, None if it was not read."""

    repo_id: str
    kind: str
    files: tuple[str, ...]
    record: Mapping[str, Any] | None
    certificate: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    base: str | None
    base_revision: str | None
    adapter: str | None
    adapter_revision: str | None
    base_card: Mapping[str, Any] | None
    base_folder: str | None = None
    hub: str = "https://huggingface.co"
    adapters: tuple[str | None, ...] = ()
    chats: bool | None = None


def hub_id(name: Any) -> str | None:
    """`name` if it can be a model on the Hub."""
    return name if isinstance(name, str) and _ID.fullmatch(name) and "--" not in name and ".." not in name else None


def paths_of(facts: Facts) -> list[str]:
    """What record and config call base and adapter where that is a path, the longest first."""
    found = [part(source, name).get("name") for source in (facts.record, facts.certificate) for name in _PARTS]
    found += [entry.get("name") for source in (facts.record, facts.certificate) for entry in adapters_of(source)]
    found += [(facts.certificate or {}).get("base"), (facts.config or {}).get("base_model_name_or_path")]
    names = {name for name in found if isinstance(name, str)}
    paths = [name for name in names if re.match(r"(?:[A-Za-z]:|~|\.{1,2})?[/\\].", name)]
    return sorted(paths, key=lambda name: (-len(name), name))


def adapters_of(record: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What a record says of its adapter, or of each if several were added."""
    several = (record or {}).get("adapters")
    found = several if isinstance(several, list) else [part(record, "adapter")]
    return [entry for entry in found if isinstance(entry, Mapping)]


def survived(facts: Facts) -> float | None:
    value = part(facts.record, "survival").get("survived")
    return float(value) if isinstance(value, (int, float)) and value == value else None


def part(source: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    found = (source or {}).get(key)
    return found if isinstance(found, Mapping) else {}
