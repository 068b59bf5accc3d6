"""Names of models on the Hub: `user/repo[@revision]` and `hf://user/repo[@revision][/folder]`."""

from __future__ import annotations

import re

from fossil_export.storage._paths import is_path

_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")
_OLD_ID = re.compile(r"[\w.-]+(@\S+)?")
# A few of the oldest models have no owner: gpt2, bert-base-uncased.


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `user/repo[@revision]`; a path that exists is looked for before."""
    return _ID.fullmatch(name) is not None and not name.startswith((".", "/", "~"))


def is_old_id(name: str) -> bool:
    """Whether `name` may be a model without an owner, and is no path here."""
    return _OLD_ID.fullmatch(name) is not None and not is_path(name)


def is_on_hub(name: str | None) -> bool:
    """Whether a record's `name` is a model on the Hub, whatever folders there are here."""
    return name is not None and (name.startswith("hf://") or is_hub_id(name))


def names_hub(name: str | None) -> bool:
    """Whether a name that PEFT or the user wrote, of which a path that exists is one, is of a model on the Hub."""
    return name is not None and is_on_hub(name) and not is_path(name)


def repository_of(name: str) -> str:
    """The repository's id in a record's `name` on the Hub."""
    user, _, rest = name.removeprefix("hf://").partition("/")
    return f"{user}/{rest.partition('/')[0].partition('@')[0]}"


def folder_of(name: str | None) -> str | None:
    """The folder within the repository in a record's `name` on the Hub, None for the root."""
    if name is None or not name.startswith("hf://"):
        return None
    inside = name.removeprefix("hf://").split("/", 2)[2:]
    folder = (
        inside[0].rpartition("/")[0] if inside and inside[0].endswith((".safetensors", ".gguf")) else "".join(inside)
    )
    return folder or None
