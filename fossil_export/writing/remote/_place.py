"""A place in an object store for a result: what may be made there, and how it begins (`Place`)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fossil_export.checkpoints._companions import PROVENANCE
from fossil_export.errors import FossilExportError, OutputError, StorageError
from fossil_export.storage.fsspec._remote import Entry
from fossil_export.writing._taking import differences
from fossil_export.writing.remote._assembly import RemoteAssembly, remove_model
from fossil_export.writing.remote._journal import Begun, Journal, is_own
from fossil_export.writing.remote._store import Store


class RemotePlace:
    """The folder `address` ("s3://bucket/prefix") of a file system of fsspec's."""

    def __init__(self, address: str) -> None:
        self._store = Store(address.rstrip("/"))
        self._journal = Journal(self._store)

    @property
    def name(self) -> str:
        return self._store.address

    @property
    def output(self) -> str:
        return self._store.address

    def check(self, inputs: list[Path], overwrite: bool, names: Sequence[str] = ()) -> None:
        place = f"{_plain(self.name)}/"
        for given in names:
            if "://" not in given:
                continue
            source = f"{_plain(given)}/"
            if place.startswith(source):
                raise OutputError(f"{self.name}: lies inside {given}, which is only read; choose another --output")
            if source.startswith(place):
                raise OutputError(f"{self.name}: holds {given}, which would be replaced; choose another --output")
        there = self._store.names()
        self._refuse(there, self._begun(there), overwrite)

    def is_begun(self) -> bool:
        return self._begun(self._store.names()) is not None

    @contextmanager
    def assemble(
        self, digest: str, about: Mapping[str, str], *, overwrite: bool = False, shared: bool = False
    ) -> Iterator[RemoteAssembly]:
        there = self._store.names()
        known = self._begun(there)
        if not shared or known is None or known.digest != digest:  # else it was begun by who may do so
            self._refuse(there, known, overwrite)
        run = "" if shared else secrets.token_hex(8)
        replaced: tuple[str, ...] = ()
        if known is None:
            record = there.get(PROVENANCE)
            old = [name for name in there if not is_own(name)]
            begun = Begun(digest, about, run, tuple(old), record.state if record else "")
        elif known.digest == digest:
            begun = replace(known, about=about, run=run)
        elif shared:
            raise OutputError(
                f"{self.name}: its parts were begun with {', '.join(differences(known.about, about))}; give every part "
                "the same arguments, inputs and version, or choose another --output"
            )
        else:
            notes = self._journal.notes(there)
            if any(note.is_finished for note in notes):
                replaced = differences(known.about, about)
            former = dict.fromkeys([*known.old, *(note.file for note in notes), *known.put])
            remove_model(self._store, known.put)  # it may have been as good as finished
            begun = Begun(digest, about, run, tuple(former), known.replaces)
        if known != begun:
            self._journal.begin(begun)
        assembly = RemoteAssembly(self._store, self._journal, begun, replaced)
        if known is not None and not shared:
            assembly.abort_uploads(there)
        try:
            yield assembly
        except (OutputError, StorageError):
            raise  # the place's own trouble may pass
        except Exception:
            if not shared:
                with suppress(FossilExportError):
                    assembly.throw_away()
            raise
        except BaseException:
            if not shared:
                with suppress(FossilExportError):
                    assembly.leave()
            raise

    def _begun(self, there: Mapping[str, Entry]) -> Begun | None:
        """What is being made here. The journal of what is finished by now goes."""
        if not any(is_own(name) for name in there):
            return None
        known = self._journal.begun()
        record = there.get(PROVENANCE)
        if record is not None and (known is None or record.state != known.replaces):
            self._journal.clear(there)
            return None
        return known

    def _refuse(self, there: Mapping[str, Entry], known: Begun | None, overwrite: bool) -> None:
        names = [name for name in there if not is_own(name)]
        if not names or (known is not None and PROVENANCE not in there):
            return
        if PROVENANCE not in there:
            raise OutputError(
                f"{self.name}: exists and was not written by fossil-export (no {PROVENANCE} in it); --overwrite "
                "replaces only its own models, choose another --output"
            )
        if not overwrite:
            raise OutputError(f"{self.name}: exists already; choose another --output or add --overwrite")


_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def _plain(address: str) -> str:
    """An address as all of its spellings have it."""
    scheme, _, rest = address.partition("://")
    return f"{_ALIASES.get(scheme.lower(), scheme.lower())}://{rest.strip('/')}"
