"""A folder at a URL: names, headers and ranges of weights at once, small files and adapters brought here."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import Step, begin
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._header import Header, header_length, parse_header
from fossil_export.checkpoints._source import Source
from fossil_export.checkpoints._weights_file import header_of, is_pickle
from fossil_export.errors import StorageError, listed, reason
from fossil_export.storage._ranges import Ranges
from fossil_export.storage.fsspec._errors import CutShortError, retried
from fossil_export.storage.fsspec._source import RemoteFile
from fossil_export.writing._single_file import staged_file

if TYPE_CHECKING:
    import numpy as np

THREADS = 8
PIECE = 8 << 20
"""Bytes of a request for a file that is brought here."""

_TAGS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "checksum")
_TIMES = ("mtime", "LastModified", "last_modified", "modified", "modify", "updated", "created")


@dataclass(frozen=True)
class Entry:
    """A file as it is listed: bytes, what the place calls its content ("" if it does not), and what changes with it."""

    size: int
    etag: str
    state: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Entry:
        etag = next((str(info[key]).strip('"') for key in _TAGS if info.get(key)), "")
        # S3 lists times to the millisecond and tells them to the second: they count if there is nothing better.
        state = etag or next((_time(info[key]) for key in _TIMES if info.get(key)), "")
        return cls(int(info.get("size") or 0), etag, state)


def _time(value: Any) -> str:
    """A moment, which some listings have as seconds and answers about one file as a date."""
    if hasattr(value, "timestamp"):
        value = value.timestamp()
    return f"{value:.3f}" if isinstance(value, (int, float)) else str(value)


class RemoteFolder:
    """The files of the folder `address`, which is `root` in fsspec's file system `system`; `entries` is what is listed
    there, by name within the folder. `path` is where those are put that are brought here: a place for just this state
    of the folder.
    """

    def __init__(self, address: str, system: Any, root: str, entries: Mapping[str, Entry], path: Path) -> None:
        self.address = address
        self.entries = entries
        self.path = path
        self._system, self._root = system, root
        # Files of one that is not made for it have one connection, and readers that read ahead for themselves.
        self._together = bool(getattr(system, "async_impl", False))
        self._options: dict[str, Any] = {} if self._together else {"cache_type": "none"}
        self._one = threading.Lock()
        self._headers: dict[str, Header] = {}

    def within(self, folder: str) -> RemoteFolder:
        """The folder of this name in it."""
        prefix = f"{folder}/"
        inside = {name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return RemoteFolder(
            f"{self.address}/{folder}", self._system, f"{self._root}/{folder}", inside, self.path / folder
        )

    @property
    def is_here(self) -> bool:
        return not self.missing(self._visible)

    @cached_property
    def _visible(self) -> list[str]:
        return sorted(name for name in self.entries if all(part[:1] not in ("", ".") for part in name.split("/")))

    def names(self) -> list[str]:
        return list(self._visible)

    def root_names(self) -> list[str]:
        return [name for name in self._visible if "/" not in name]

    def headers(self, names: Iterable[str]) -> tuple[Header, ...]:
        names = list(names)
        left = [name for name in names if name not in self._headers]
        with ThreadPoolExecutor(THREADS) as pool:
            self._headers.update(zip(left, pool.map(self._header, left), strict=True))
        return tuple(self._headers[name] for name in names)

    def _header(self, name: str) -> Header:
        path, size = self.path / name, self.entries[name].size
        if is_pickle(name):
            from fossil_export.checkpoints.pickled import parse_pickle_header

            far = Ranges(lambda start, stop: self.view(name, start, stop - start).data, size)
            with io.BufferedReader(far, 1 << 16) as file:
                return parse_pickle_header(path, file, size, far=True)
        prefix = self.view(name, 0, min(size, 8)).tobytes()
        length = header_length(path, prefix, size)
        return parse_header(path, prefix + self.view(name, 8, length - 8).tobytes(), size)

    def read(self, name: str) -> bytes:
        self.fetch([name])
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return self.entries[name].size

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        if (self.path / name).is_file():
            return LocalFolder(self.path).view(name, offset, nbytes)
        import numpy as np

        return np.frombuffer(self.range(name, offset, offset + nbytes), np.uint8)

    def open(self, header: Header) -> Source:
        self.check_state(header.path.name)
        return RemoteFile(self, header.path.name, header.size)

    def blob(self, name: str) -> str | None:
        return None

    def etag(self, name: str) -> str | None:
        return self.entries[name].etag or None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not here."""
        return [name for name in names if not (self.path / name).is_file()]

    def fetch(self, names: Iterable[str]) -> None:
        """Bring files to `path`, each whole or not at all. Raises StorageError."""
        missing = self.missing(dict.fromkeys(names))
        if unknown := [name for name in missing if name not in self.entries]:
            raise StorageError(f"{self.address}: has no {listed(unknown)}; check the address")
        if not missing:
            return
        self._check_room(sum(self.entries[name].size for name in missing))
        small = [name for name in missing if self.entries[name].size <= PIECE]
        step = begin(f"fetching {listed(missing, 1)}", sum(self.entries[name].size for name in missing), "B")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(partial(self._bring_small, step), small))
            for name in missing:
                if self.entries[name].size > PIECE:
                    self._bring_large(name, pool, step)

    def check(self, headers: Iterable[Header]) -> None:
        for header in headers:
            if header.path.is_file() and header_of(header.path).encoded != header.encoded:
                raise self.changed(header.path.name)

    def check_links(self, names: Iterable[str]) -> None:
        pass

    def check_state(self, name: str) -> None:
        """Raise StorageError if a file is another one than that which was listed."""
        listed_as = self.entries[name]
        found = Entry.of(self._info(name))
        if (found.size, found.state) != (listed_as.size, listed_as.state):
            raise self.changed(name)

    def changed(self, name: str) -> StorageError:
        return StorageError(
            f"{self.address}/{name}: changed while it was being read; wait until whatever writes it is done, then run "
            "the command again"
        )

    def range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, in one request. Raises StorageError."""
        if stop <= start:
            return b""

        def run() -> bytes:
            found = self._read_range(f"{self._root}/{name}", start, stop)
            if len(found) != stop - start:
                raise CutShortError(f"{len(found):,} bytes came of {stop - start:,} from byte {start:,} on")
            return found

        return retried(run, f"{self.address}/{name}")

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        if self._together:
            return bytes(self._system.cat_file(path, start=start, end=stop))
        with self._one:
            return bytes(self._system.cat_file(path, start=start, end=stop, **self._options))

    def _info(self, name: str) -> Mapping[str, Any]:
        def run() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            found: Mapping[str, Any] = self._system.info(f"{self._root}/{name}")
            return found

        return retried(run, f"{self.address}/{name}")

    def _bring_small(self, step: Step, name: str) -> None:
        content = self.range(name, 0, self.entries[name].size)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != self.entries[name].etag:
            self.check_state(name)  # the store calls it by something else than its MD5
        with self._staged(name) as path:
            path.write_bytes(content)
        step(len(content))

    def _bring_large(self, name: str, pool: ThreadPoolExecutor, step: Step) -> None:
        size = self.entries[name].size
        with self._staged(name) as path, path.open("r+b") as file:
            descriptor = file.fileno()

            def bring(start: int) -> None:
                content = self.range(name, start, min(size, start + PIECE))
                while content:
                    done = os.pwrite(descriptor, content, start)
                    content, start = content[done:], start + done
                    step(done)

            list(pool.map(bring, range(0, size, PIECE)))
            self.check_state(name)

    def _staged(self, name: str) -> _Staged:
        return _Staged(self.path / name)

    def _check_room(self, nbytes: int) -> None:
        place = self.path
        while not place.exists():
            place = place.parent
        if (free := shutil.disk_usage(place).free) < nbytes:
            raise StorageError(
                f"{self.address}: fetching it takes {nbytes:,} bytes, {place} has {free:,} free; make room, or move "
                "the cache with XDG_CACHE_HOME"
            )


class _Staged:
    """A new file that takes its name when the block ends, unless another process was first: it has the same."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = staged_file(self._path, overwrite=False)
            return self._file.__enter__()
        except OSError as problem:
            raise self._refused(problem) from problem

    def __exit__(self, *problem: Any) -> None:
        try:
            with suppress(FileExistsError):
                self._file.__exit__(*problem)
        except OSError as refused:
            if problem[1] is refused:  # it came out of the block
                raise
            raise self._refused(refused) from refused

    def _refused(self, problem: OSError) -> StorageError:
        return StorageError(
            f"{self._path}: cannot be written: {reason(problem)}; make room, or move the cache with XDG_CACHE_HOME"
        )
