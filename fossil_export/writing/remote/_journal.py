"""What is kept in an object store of a result that is not finished: small objects in a hidden folder of its place.

`merge.json` says what the result is of, and what was there before it; `notes/` has an object for each file that was
begun, and says of a finished one what it was then. An object is written whole or not at all, so that what is there can
be believed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import quote

from fossil_export.storage.fsspec._remote import Entry
from fossil_export.writing.remote._store import Store

JOURNAL = ".fossil-export"
_FORMAT = 1
_ABOUT, _NOTES = f"{JOURNAL}/merge.json", f"{JOURNAL}/notes/"


@dataclass(frozen=True)
class Begun:
    """What a result is of: `digest` and `about` as in `Place.assemble`; `run` is the process that has it alone, "" if
    it is shared. `old` are the objects that were there before, which go when it is finished, and `replaces` is the
    state of the record among them. `put` are those that go beside the files, once they are being written."""

    digest: str
    about: Mapping[str, str]
    run: str = ""
    old: tuple[str, ...] = ()
    replaces: str = ""
    put: tuple[str, ...] = ()


@dataclass(frozen=True)
class Note:
    """Of a file that was begun by a run for `digest`. If it is finished, `size` and `state` tell it from another one,
    and `about` is what is to be known of it."""

    file: str
    digest: str
    size: int = -1
    state: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.size >= 0

    def is_of(self, entry: Entry | None) -> bool:
        return self.is_finished and entry is not None and (entry.size, entry.state) == (self.size, self.state)


class Journal:
    """That of a `store`. Raises what the store does."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begun(self) -> Begun | None:
        """None if there is none, or it cannot be understood."""
        content = self._store.read(_ABOUT)
        try:
            found = json.loads(content or b"")
            if found.pop("format") != _FORMAT:
                return None
            known = Begun(**found)
            return replace(
                known,
                about={str(k): str(v) for k, v in known.about.items()},
                old=tuple(known.old),
                put=tuple(known.put),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def begin(self, about: Begun) -> None:
        self._store.write(_ABOUT, _json({"format": _FORMAT, **asdict(about)}))

    def notes(self, there: Iterable[str]) -> list[Note]:
        """Those among the objects that are `there`."""
        found = []
        for content in self._store.read_all(name for name in there if name.startswith(_NOTES)).values():
            try:
                note = Note(**json.loads(content))
                if isinstance(note.file, str) and type(note.size) is int and isinstance(note.about, dict):
                    found.append(note)
            except (ValueError, TypeError, RecursionError):
                continue
        return found

    def note(self, note: Note) -> None:
        self._store.write(f"{_NOTES}{quote(note.file, safe='')}.json", _json(asdict(note)))

    def forget(self, notes: Iterable[Note]) -> None:
        self._store.remove(f"{_NOTES}{quote(note.file, safe='')}.json" for note in notes)

    def clear(self, there: Iterable[str]) -> None:
        """Remove all of it, the beginning last."""
        own = [name for name in there if is_own(name)]
        self._store.remove(name for name in own if name != _ABOUT)
        self._store.remove([_ABOUT])


def is_own(name: str) -> bool:
    """Whether an object is of a journal."""
    return name.startswith(f"{JOURNAL}/")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
