"""One file on its way to a file system, part by part: as S3's multipart upload, with several at a time, or a stream.

A stream is what every file system of fsspec can write, but it has one request under way at a time. S3 takes parts side
by side, and is what most people have, so it is worth its own dozen lines.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any, Protocol

from fossil_export.storage.fsspec._errors import ATTEMPTS, CutShortError

MB = 1 << 20
MOST_PARTS = 10_000
"""Of one file in S3."""

PARTS = (8 * MB, 16 * MB, 32 * MB, 64 * MB)
"""Bytes; S3 wants at least 5 MB, and the smallest one is a slab of the merge."""

LANES = 4
"""Parts of a file on their way at a time."""

LARGEST = MOST_PARTS * PARTS[-1]
"""Bytes of a file. S3 takes 5 TB, for which parts would have to be larger than what may be in memory."""


OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "memory"}
"""Protocols of file systems without folders."""


def part_size(size: int) -> int:
    """Bytes of a part of a file of `size` bytes, which is no larger than `LARGEST`."""
    return next(part for part in PARTS if part * MOST_PARTS >= size)


class Upload(Protocol):
    """`part` is called for each part, in their order, by up to `lanes` threads at a time. `data` may be written over
    when it returns. Whatever it raises, `abort` follows."""

    lanes: int

    def part(self, number: int, data: bytearray | memoryview) -> None:
        """Send part `number`, from 0 on."""

    def finish(self) -> None:
        """All parts are there: the file appears."""

    def abort(self) -> None:
        """Nothing appears, and nothing is left. Raises nothing."""


class _Body(io.RawIOBase):
    """Bytes to be sent, as a file: the client copies what is none. s3fs, which repeats a request that the client gave
    up, hands over the same file where the last request left it: what follows there is all that is sent then."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at, self._start = data, 0, 0

    @property
    def is_sent(self) -> bool:
        """Whether the last request had all of it."""
        return self._start == 0 and self._at == len(self._data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = self._start = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class S3Upload:
    """To a path of s3fs."""

    lanes = LANES

    def __init__(self, system: Any, path: str, parts: int) -> None:
        bucket, key, _ = system.split_path(path)
        self._system, self._path = system, path
        self._place = {"Bucket": bucket, "Key": key}
        self._tags: dict[int, str] = {}
        self._id: str | None = None
        if parts > 1:
            self._id = system.call_s3("create_multipart_upload", **self._place)["UploadId"]

    def part(self, number: int, data: bytearray | memoryview) -> None:
        if self._id is None:
            self._send("put_object", data)
            return
        said = self._send("upload_part", data, PartNumber=number + 1, UploadId=self._id)
        self._tags[number] = said["ETag"]

    def _send(self, request: str, data: bytearray | memoryview, **about: Any) -> Any:
        """Its client repeats what failed."""
        for _ in range(ATTEMPTS):
            body = _Body(memoryview(data))
            said = self._system.call_s3(request, Body=body, **about, **self._place)
            if body.is_sent:
                return said
        raise CutShortError("only the end of it was sent, since its server was too busy")

    def finish(self) -> None:
        if self._id is not None:
            parts = [{"PartNumber": number + 1, "ETag": self._tags[number]} for number in sorted(self._tags)]
            self._system.call_s3(
                "complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts}, **self._place
            )
        self._system.invalidate_cache(self._path)

    def abort(self) -> None:
        if self._id is not None:
            with suppress(Exception):  # the next run aborts it
                self._system.call_s3("abort_multipart_upload", UploadId=self._id, **self._place)


class StreamUpload:
    """To a path of any file system that fsspec can write to."""

    lanes = 1

    def __init__(self, system: Any, path: str, parts: int) -> None:
        self._system, self._path = system, path
        make_parents(system, path)
        self._file = system.open(path, "wb", block_size=PARTS[1], autocommit=False)

    def part(self, number: int, data: bytearray | memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.close()
        self._file.commit()

    def abort(self) -> None:
        with suppress(Exception):
            self._file.discard()
        # Else it would be finished when it is collected.
        with suppress(Exception):
            self._file.closed = True
        with suppress(Exception):  # of a file system that shows a file while it is written
            if self._system.exists(self._path):
                self._system.rm_file(self._path)


def make_parents(system: Any, path: str) -> None:
    """The folders that `path` lies in, of a file system that has folders. Object stores have none, and would make a
    bucket."""
    if not protocols(system) & OBJECTS:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)


def protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def upload(system: Any, path: str, parts: int) -> Upload:
    """A new file at `path`. Raises what the file system does."""
    return (S3Upload if hasattr(system, "call_s3") else StreamUpload)(system, path, parts)
