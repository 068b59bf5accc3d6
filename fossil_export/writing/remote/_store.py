"""The objects below an address, in any file system that fsspec can write to: listed, read, written and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fossil_export.errors import OutputError
from fossil_export.storage.fsspec._connect import connect
from fossil_export.storage.fsspec._errors import retried
from fossil_export.storage.fsspec._remote import Entry
from fossil_export.writing.remote._uploads import PARTS, make_parents, upload
from fossil_export.writing.remote._window import Window

T = TypeVar("T")

THREADS = 8
"""Small requests at a time."""


class Store:
    """The folder `address` there; names are relative to it. Raises a FossilExportError that names the object."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._system, self._root = connect(address, OutputError, "writing to")

    def names(self) -> dict[str, Entry]:
        """All objects, hidden ones too."""

        def run() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            try:
                found: Mapping[str, Any] = self._system.find(self._root, detail=True)
                return found
            except FileNotFoundError:
                if "/" in self._root.strip("/"):  # a folder that is not there; else it is the bucket
                    return {}
                raise

        found = self._ask("", run, attempts=2)
        start = f"{self._root}/"
        return {
            str(key)[len(start) :]: Entry.of(info)
            for key, info in found.items()
            if str(key).startswith(start) and not str(key).endswith("/") and info.get("type") != "directory"
        }

    def entry(self, name: str) -> Entry:
        """An object as it is listed. Raises StorageError if it is not there."""

        def run() -> Entry:
            self._system.invalidate_cache()
            return Entry.of(self._system.info(self._path(name)))

        found = self._ask(name, run)
        # Times are told in one way and listed in another.
        return found if found.etag else self.names().get(name, found)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """A small object, or a range of one; None if there is none."""

        span = {} if start is None else {"start": start, "end": stop}

        def run() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._path(name), **span))
            except FileNotFoundError:
                return None

        return self._ask(name, run)

    def write(self, name: str, content: bytes | Path) -> None:
        """Put an object in the place of what is there."""
        if isinstance(content, bytes):
            self._write(name, content)
        elif (size := content.stat().st_size) <= PARTS[0]:
            self._write(name, content.read_bytes())
        else:
            self._send(name, content, size)

    def create(
        self,
        name: str,
        size: int,
        hash: bool = False,  # noqa: A002
        finished: Callable[[Window], None] = lambda window: None,
    ) -> Window:
        """A large object, to be written piece by piece."""
        return Window(
            f"{self.address}/{name}",
            size,
            lambda parts: upload(self._system, self._path(name), parts),
            hash=hash,
            finished=finished,
        )

    def remove(self, names: Iterable[str]) -> None:
        def one(name: str) -> None:
            def run() -> None:
                with suppress(FileNotFoundError):
                    self._system.rm_file(self._path(name))

            self._ask(name, run)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, names))

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Small objects, those that are there."""
        wanted = list(names)
        with ThreadPoolExecutor(THREADS) as pool:
            return {name: found for name, found in zip(wanted, pool.map(self.read, wanted), strict=True) if found}

    def abort(self, names: Iterable[str]) -> None:
        """Abort the multipart uploads of these that nobody will complete. Raises nothing: where they may not be listed,
        a rule of the bucket has to see to them."""
        if not hasattr(self._system, "call_s3"):
            return
        wanted = {self._system.split_path(self._path(name))[:2] for name in names}
        if not wanted:
            return
        bucket, prefix, _ = self._system.split_path(f"{self._root}/")
        place = {"Bucket": bucket, "Prefix": prefix}
        more: dict[str, str] = {}
        with suppress(Exception):
            while True:
                said = self._system.call_s3("list_multipart_uploads", **place, **more)
                for one in said.get("Uploads", []):
                    if (bucket, one["Key"]) in wanted:
                        self._system.call_s3(
                            "abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"]
                        )
                if not said.get("IsTruncated"):
                    return
                more = {"KeyMarker": said["NextKeyMarker"], "UploadIdMarker": said["NextUploadIdMarker"]}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, content: bytes) -> None:
        def run() -> None:
            make_parents(self._system, self._path(name))
            self._system.pipe_file(self._path(name), content)

        self._ask(name, run)

    def _send(self, name: str, path: Path, size: int) -> None:
        import numpy as np

        buffer = np.empty(PARTS[0], np.uint8)
        done = False
        with path.open("rb", buffering=0) as file:
            window = self.create(name, size)
            try:
                offset = 0
                while offset < size:
                    count = file.readinto(buffer[: size - offset].data)
                    if not count:
                        raise OSError(f"{path}: was cut while it was read")
                    window.write(offset, buffer[:count])
                    offset += count
                done = True
            finally:
                window.close(done)

    def _ask(self, name: str, run: Callable[[], T], attempts: int = 5) -> T:
        return retried(run, f"{self.address}/{name}".rstrip("/"), "cannot be written", attempts)
