"""The paths of this machine do not go to the Hub: of each, its last part stands for it, or nothing."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from fossil_export.artifacts._kind import ADAPTER_CONFIG
from fossil_export.checkpoints._companions import CERTIFICATE, PROVENANCE
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.storage.hub._names import is_hub_id

_RECORDS = (PROVENANCE, CERTIFICATE)
_CONFIG = re.compile(r"(.*_)?config\.json|special_tokens_map\.json")
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:|~\w*|\.{1,2})?[/\\]")
_PATH_KEY = re.compile(r"(path|file|dir|folder|directory)$", re.IGNORECASE)
_ROOTED = re.compile(r"[A-Za-z]:[/\\]|~\w*[/\\]|[/\\]")
_IN_TEXT = re.compile(r"(?<![\w.:/\\-])(?:[A-Za-z]:|~|\.{1,2})?[/\\](?:[^\s/\\:;,'\"]+[/\\])*([^\s/\\:;,'\"]+)[/\\]?")


class Paths:
    """What reads as a path of this machine: what lies in `places`, the folders at hand, in the user's own or in one
    for temporary files; and `names`, which are what records call a base and an adapter that are not on the Hub."""

    def __init__(self, places: Iterable[Path] = (), names: Iterable[str] = ()) -> None:
        self._names = {name: Path(name).name for name in names if Path(name).name}
        found = [*places, *(Path(name).expanduser() for name in self._names if Path(name).is_absolute())]
        for known in (Path.home, Path.cwd, lambda: Path(tempfile.gettempdir())):
            with suppress(RuntimeError, OSError):
                found.append(known())
        roots = set[str]()
        for one in found:
            roots.add(str(one.absolute()))
            with suppress(RuntimeError, OSError, ValueError):  # loops, and names that no file can have
                roots.add(str(one.resolve()))
        roots -= {"/"}
        either = "|".join(map(re.escape, sorted(roots, key=len, reverse=True)))
        self._whole = re.compile(rf"(?:{either})(?:/[^\n]*)?")
        self._within = re.compile(rf"(?<![\w./])(?:{either})(?![\w.-])(?:/[^\s/:;,'\"()]+)*/?")

    def without(self, value: Any) -> Any:
        """A record without them."""
        result = _mapped(value, self._shortened)
        if isinstance(value, Mapping) and isinstance(
            reason := value.get("reason"), str
        ):  # a sentence, of paths anywhere
            result["reason"] = _IN_TEXT.sub(r"\1", self._within.sub(_last_part, reason))
        return result

    def published(self, name: str, content: bytes) -> bytes:
        """What is published of a file: `content` itself wherever nothing in it is a path of this machine."""
        if "/" in name or not (_CONFIG.fullmatch(name) or name in _RECORDS):
            return content
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            return content
        if not isinstance(given, dict):
            return content
        if name in _RECORDS:
            cleaned = self.without(given)
        else:  # templates and the like are not to be touched
            known = _mapped(given, lambda text: Path(text).name if self._whole.fullmatch(text) else text)
            cleaned = _without_foreign(known)
        base = given.get("base_model_name_or_path")
        if name == ADAPTER_CONFIG and isinstance(base, str) and is_path(base):
            # The last part alone would be taken for a model on the Hub.
            cleaned["base_model_name_or_path"] = None
        return content if cleaned == given else write_json(cleaned)

    def _shortened(self, text: str) -> str:
        if self._whole.fullmatch(text):
            return Path(text).name
        return self._names.get(text) or self._within.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    return Path(found[0]).name


def _without_foreign(value: Any, key: str = "") -> Any:
    """A config where what is named as a path and begins as one, of whatever machine, is its last part."""
    if isinstance(value, Mapping):
        return {name: _without_foreign(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_foreign(entry, key) for entry in value]
    if isinstance(value, str) and _PATH_KEY.search(key) and _ROOTED.match(value):
        return PureWindowsPath(value).name or value
    return value


def is_path(name: str) -> bool:
    """Whether what should be a model's id is a path, on whatever machine."""
    return _ABSOLUTE.match(name) is not None or (not is_hub_id(name) and ("/" in name or _exists(name)))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, as JSON has it, with every string in it changed."""
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value
