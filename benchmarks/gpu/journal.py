"""The rows found so far, a line of JSON each, so that a run that was cut can be taken up again."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.cases import Case, Row, row_of

MARK = "gpu_parity"


class JournalError(Exception):
    """The journal cannot be taken up; one line that says why and what helps."""


@dataclass(frozen=True)
class Entry:
    """A row, what it cost, and versions it depends on beside the journal's own (those of the ONNX part)."""

    case: Case
    row: Row
    seconds: float = 0.0
    written: int = 0
    peak: int = 0
    versions: dict[str, str] = field(default_factory=dict)


class Journal:
    """A file whose first line says what its rows were found with. Held by one run at a time.

    A last line that was cut off is dropped. Of two entries for one case the later one counts. `versions` are those
    that entries to come will bear; entries with others are refused, as another header is.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], versions: dict[str, str] | None = None, fresh: bool = False
    ) -> None:
        self._path = path
        self.entries: dict[Case, Entry] = {}
        self._file = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                raise JournalError(
                    f"{path}: another run writes to it; wait for it, or take another --journal"
                ) from problem
            self._file.seek(0)
            self._open(self._file.read(), json.loads(json.dumps(header)), fresh)
            for entry in self.entries.values():
                if versions and entry.versions and entry.versions != versions:
                    raise JournalError(self._other(entry.versions, versions))
        except BaseException:
            self._file.close()
            raise

    def add(self, entry: Entry) -> None:
        """Note a row; it is on the disk when this returns."""
        self.entries[entry.case] = entry
        self._write(asdict(entry))

    def close(self) -> None:
        self._file.close()

    def _open(self, data: bytes, header: dict[str, Any], fresh: bool) -> None:
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        found = self._header(lines[0]) if lines else {}
        if not lines and data and not data.startswith(f'{{"{MARK}"'.encode()):
            raise JournalError(self._no_journal())
        if fresh or not lines:
            self._file.truncate(0)
            self._write({MARK: 1, **header})
            return
        for part in header:
            if found.get(part) != header[part]:
                raise JournalError(self._other(found.get(part), header[part]))
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = json.loads(line)
                case = Case(**record.pop("case"))
                self.entries[case] = Entry(case, row_of(case.part, record.pop("row")), **record)
            except (ValueError, TypeError, KeyError, AttributeError) as problem:
                raise JournalError(f"{self._path}: line {number} is damaged; {_REMEDY}") from problem
        self._file.truncate(len(whole))

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or MARK not in found:
            raise JournalError(self._no_journal())
        return found

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _no_journal(self) -> str:
        return f"{self._path}: is no journal of this benchmark; give another --journal"

    def _other(self, found: Any, wanted: dict[str, Any]) -> str:
        found = found if isinstance(found, dict) else {}
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        told = "; ".join(f"{name} {found.get(name)} there, {wanted.get(name)} here" for name in names)
        return f"{self._path}: its rows were found with something else ({told}); {_REMEDY}"


_REMEDY = "give another --journal, or --fresh to begin it anew"
