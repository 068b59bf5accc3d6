"""A result that comes together in an object store.

Such a store has no names that can be exchanged in one step: each file gets its name as soon as it is whole. What makes
a model of them comes last (index, config, record), so that nobody loads a part of one, and goes first where a model is
replaced, so that nobody loads a mixture of two. To copy the new files over the old ones at the end would keep the old
model longer, but twice the room, and the copies of terabytes take their time, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.errors import FossilExportError, OutputError, failed, listed
from fossil_export.storage.fsspec._remote import Entry
from fossil_export.writing.remote._journal import Begun, Journal, Note
from fossil_export.writing.remote._store import Store
from fossil_export.writing.remote._uploads import LARGEST
from fossil_export.writing.remote._window import Window

_BLOCK = 8 << 20


class RemoteAssembly:
    """See `Assembly`. What `put` is given is written by `publish`, when all else is there."""

    def __init__(self, store: Store, journal: Journal, begun: Begun, replaced: tuple[str, ...]) -> None:
        self.replaced = replaced
        self.is_published = False
        self._store, self._journal, self._begun = store, journal, begun
        self._sums: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._finished: set[str] = set()  # as far as this process was told
        self._put: dict[str, bytes | Path] = {}
        self._is_cleared = False

    def create(self, name: str, size: int, hash: bool = False) -> Window:  # noqa: A002
        if size > LARGEST:
            raise OutputError(
                f"{self._store.address}/{name}: would have {size:,} bytes, of which {LARGEST:,} can be sent; cut the "
                "weights with --max-shard-size"
            )
        self._check_ours()
        self._clear_old()
        self._journal.note(Note(name, self._begun.digest))

        self._sizes[name] = size

        def finished(window: Window) -> None:
            if window.sha256 is not None:
                self._sums[name] = window.sha256

        return self._store.create(name, size, hash, finished)

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        self._put |= contents

    def sha256(self, name: str) -> str:
        if name not in self._sums:
            total, size = hashlib.sha256(), self._store.entry(name).size
            for start in range(0, size, _BLOCK):
                total.update(self._store.read(name, start, min(size, start + _BLOCK)) or b"")
            self._sums[name] = total.hexdigest()
        return self._sums[name]

    def notes(self) -> dict[str, dict[str, Any]]:
        there = self._store.names()
        own = (note for note in self._journal.notes(there) if note.digest == self._begun.digest)
        found = {note.file: dict(note.about) for note in own if note.is_of(there.get(note.file))}
        self._finished |= found.keys()
        return found

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        entry = self._store.entry(name)
        if (size := self._sizes.get(name, entry.size)) != entry.size:
            raise OutputError(
                f"{self._store.address}/{name}: {entry.size:,} of {size:,} bytes arrived; run the same command again"
            )
        self._check_ours()
        self._journal.note(Note(name, self._begun.digest, entry.size, entry.state, about))
        self._finished.add(name)

    def check_room(self, needed: int) -> None:
        """There is always room."""

    def failed(self, problem: OSError) -> FossilExportError:
        return OutputError(failed(self._store.address, problem, Path(self._store.address)))

    def publish(self) -> None:
        self._check_ours()
        self._clear_old()
        there = self._store.names()
        notes = self._journal.notes(there)
        made = [note for note in notes if note.is_finished and note.digest == self._begun.digest]
        if lost := sorted(self._finished - {note.file for note in made}):
            raise OutputError(
                f"{self._store.address}: what was noted of {listed(lost)} is not there any more; see that nothing else "
                "writes there, then run the same command again"
            )
        self._check_files(made, there)
        self._store.abort(note.file for note in notes)
        new = {*(note.file for note in made), *self._put}
        old = {*self._begun.old, *(note.file for note in notes)}
        self._store.remove(name for name in there if name in old - new)
        self._begun = replace(self._begun, put=tuple(self._put))
        self._journal.begin(self._begun)
        last: dict[Callable[[str], bool], list[str]] = {_is_index: [], _is_config: [], _is_record: []}
        for name, content in self._put.items():
            for is_last, names in last.items():
                if is_last(name):
                    names.append(name)
                    break
            else:
                self._store.write(name, content)
        for names in last.values():
            for name in names:
                self._store.write(name, self._put[name])
        there = self._store.names()
        try:
            self._check_files(made, there)
            self._check_put(there)
        except OutputError:
            self._store.remove(name for name in self._put if _is_config(name) or _is_record(name))
            raise
        self._journal.clear(there)
        self.is_published = True

    def abort_uploads(self, there: Iterable[str]) -> None:
        """Those of files that killed processes had begun."""
        self._store.abort(note.file for note in self._journal.notes(there))

    def leave(self) -> None:
        """The process ends: what is finished stays; if that is nothing, nothing does."""
        if not self.notes():
            self.throw_away()

    def throw_away(self) -> None:
        """Remove what was made here. Where a model was being replaced, it stays noted that the rest of it may go."""
        there = self._store.names()
        notes = self._journal.notes(there)
        self.abort_uploads(there)
        remove_model(self._store, self._begun.put)
        self._store.remove({*self._begun.put, *(note.file for note in notes if note.digest == self._begun.digest)})
        if self._begun.old and PROVENANCE not in there:
            self._journal.forget(notes)
        else:
            self._journal.clear(there)

    def _check_ours(self) -> None:
        """Raise OutputError if another process has begun another result here."""
        known = self._journal.begun()
        if known is None or (known.digest, known.run) != (self._begun.digest, self._begun.run):
            raise OutputError(
                f"{self._store.address}: another process writes there, too, and files of both may be mixed; when it "
                "has ended, run one of the two again with --overwrite"
            )

    def _check_files(self, made: Iterable[Note], there: Mapping[str, Entry]) -> None:
        """Raise OutputError if files are not those that were noted."""
        changed = [note.file for note in made if not note.is_of(there.get(note.file))]
        if changed:
            raise OutputError(
                f"{self._store.address}: {listed(changed)} changed after it was written; see that nothing else writes "
                "there, then run the same command again"
            )

    def _check_put(self, there: Mapping[str, Entry]) -> None:
        """Raise OutputError if what goes beside the files did not come there whole."""
        for name, content in self._put.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            if name not in there or there[name].size != size:
                raise OutputError(
                    f"{self._store.address}/{name}: did not arrive whole, or was removed again; see that nothing else "
                    "writes there, then run the same command again"
                )

    def _clear_old(self) -> None:
        """What makes a model of the old files goes."""
        if self._is_cleared:
            return
        record = self._store.names().get(PROVENANCE) if self._begun.replaces else None
        if record is not None and record.state == self._begun.replaces:  # else another process was first
            remove_model(self._store, self._begun.old)
        self._is_cleared = True


def remove_model(store: Store, names: Iterable[str]) -> None:
    """Remove those of `names` that make files a model, in an order in which nothing is loaded in between."""
    found = list(names)
    for is_next in (_is_config, _is_index, _is_record):
        store.remove(name for name in found if is_next(name))


def _is_config(name: str) -> bool:
    return name == "config.json"


def _is_index(name: str) -> bool:
    return "/" not in name and name.endswith(".index.json")


def _is_record(name: str) -> bool:
    return name == PROVENANCE
