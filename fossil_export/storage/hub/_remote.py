"""A model on the Hub as a folder: names and headers at once, whole files when they are asked for.

Everything is read at one commit, through the Hub's own client and cache.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._log import timed
from fossil_export._progress import Step, begin
from fossil_export._threads import in_context
from fossil_export.checkpoints._folder import LocalFolder, hub_blob
from fossil_export.checkpoints._header import Header, header_length, parse_header
from fossil_export.checkpoints._weights_file import header_of, is_pickle
from fossil_export.errors import HubError, listed
from fossil_export.storage._ranges import Ranges
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._background import interruptible
from fossil_export.storage.hub._errors import retried

if TYPE_CHECKING:
    import numpy as np

_THREADS = 8


@dataclass(frozen=True)
class Entry:
    """A file as the Hub lists it: bytes, and SHA-256 (large files) or git's SHA-1 of its content; "" if unknown."""

    size: int
    blob: str


class HubFolder:
    """The files of `repository` at `commit`; `entries` is what the Hub lists, by name within the folder.

    `prefix` is "", or the folder in the repository that this one is: "sub/folder/".
    """

    def __init__(self, repository: str, commit: str, entries: Mapping[str, Entry], prefix: str = "") -> None:
        self.repository = repository
        self.commit = commit
        self.entries = entries
        self.prefix = prefix
        self.path = storage_of(repository) / "snapshots" / commit / prefix

    def within(self, folder: str) -> HubFolder:
        """The folder of this name in it."""
        prefix = f"{folder}/"
        inside = {name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return HubFolder(self.repository, self.commit, inside, self.prefix + prefix)

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
        with ThreadPoolExecutor(_THREADS) as pool:
            return tuple(pool.map(in_context(self._header), names))

    def _header(self, name: str) -> Header:
        path = self.path / name
        if path.is_file():
            return header_of(path)
        size = self.entries[name].size
        if is_pickle(name):
            from fossil_export.checkpoints.pickled import parse_pickle_header

            with io.BufferedReader(Ranges(partial(self._range, name), size), 1 << 16) as file:
                return parse_pickle_header(path, file, size, far=True)
        # To the byte, in two requests: of a file that is copied on the Hub, no weight comes here.
        prefix = self._range(name, 0, min(size, 8))
        length = header_length(path, prefix, size)
        return parse_header(path, prefix + self._range(name, 8, length), size)

    def read(self, name: str) -> bytes:
        self.fetch([name])
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return self.entries[name].size

    def view(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        if (self.path / name).is_file():
            return LocalFolder(self.path).view(name, offset, nbytes)
        import numpy as np

        return np.frombuffer(self._range(name, offset, offset + nbytes), np.uint8)

    def blob(self, name: str) -> str | None:
        return hub_blob(self.path / name) or self.entries[name].blob or None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not in the cache."""
        return [name for name in names if not (self.path / name).is_file()]

    def fetch(self, names: Iterable[str]) -> None:
        """Through the Hub's cache; what came is held against the hashes the Hub lists. Raises HubError."""
        from huggingface_hub import snapshot_download

        missing = self.missing(names)
        if not missing:
            return
        if unknown := [name for name in missing if name not in self.entries]:
            raise HubError(f"{self.repository}: has no {listed(unknown)} at {self.commit[:12]}")
        size = sum(self.entries[name].size for name in missing)
        self._check_room(size)
        wanted = [escape(self.prefix + name) for name in missing]
        step = begin(f"fetching {listed(missing, 1)}", sum(self.entries[name].size for name in missing), "B")

        def run() -> None:
            snapshot_download(
                self.repository,
                revision=self.commit,
                allow_patterns=wanted,
                tqdm_class=_silent(step),
                library_name=client.LIBRARY,
            )

        with timed("fetched %s of %s, %d bytes", ", ".join(missing), self.repository, size):
            retried(lambda: interruptible(run), self.repository)
        if absent := self.missing(missing):  # the client takes what is cached where the Hub has trouble
            raise HubError(f"{self.repository}: {listed(absent)} did not come; run the same command again")
        with ThreadPoolExecutor(2) as pool:
            sound = list(pool.map(self._is_sound, missing))
        damaged = [name for name, is_whole in zip(missing, sound, strict=True) if not is_whole]
        for name in damaged:  # nothing wrong stays in the cache
            (self.path / name).resolve().unlink(missing_ok=True)
            (self.path / name).unlink(missing_ok=True)
        if damaged:
            raise self.damaged(damaged)

    def check(self, headers: Iterable[Header]) -> None:
        """A header that came damaged, in a range without a hash, must not decide where the tensors are."""
        changed = [header.path.name for header in headers if header_of(header.path).encoded != header.encoded]
        if changed:
            raise self.damaged(changed)

    def check_links(self, names: Iterable[str]) -> None:
        pass  # the client makes the links of its cache, all of them to blobs there

    def damaged(self, names: list[str]) -> HubError:
        """The error for files that are not what the Hub lists."""
        return HubError(
            f"{self.repository}: {listed(names)} came with other bytes than the Hub lists; run the same command again"
        )

    def _is_sound(self, name: str) -> bool:
        return is_sound(self.path / name, self.entries[name])

    def _check_room(self, nbytes: int) -> None:
        from huggingface_hub import constants

        place = Path(constants.HF_HUB_CACHE)
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < nbytes:
            raise HubError(
                f"{self.repository}: fetching it takes {nbytes:,} bytes, {place} has {free:,} free; make room, or move "
                "the cache with HF_HOME"
            )

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, and no more, whatever the server sends."""
        if stop <= start:
            return b""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, self.prefix + name, revision=self.commit)
        headers = {
            **build_hf_headers(library_name=client.LIBRARY),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }

        def run() -> bytes:
            with client.streamed(url, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT) as (response, chunks):
                skip = start if response.status_code == 200 else 0
                found = bytearray()
                for chunk in chunks:
                    found += chunk
                    if len(found) >= skip + stop - start:
                        return bytes(found[skip : skip + stop - start])
            raise ConnectionError(f"{name} ends before byte {stop}")

        return retried(run, self.repository)


def storage_of(repository: str) -> Path:
    """Where the Hub's cache keeps a model. Raises ValueError for what is no name of one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / str(constants.REPO_ID_SEPARATOR).join(["models", *repository.split("/")])


def is_sound(path: Path, entry: Entry) -> bool:
    """Whether a file has the size and the hash that the Hub lists."""
    size = path.stat().st_size
    if size != entry.size or not entry.blob:
        return size == entry.size
    digest = hashlib.sha256() if len(entry.blob) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() == entry.blob


def _silent(step: Step) -> Any:
    """A bar of the client's that is not shown, but told: the first that counts bytes has those of the files, and the
    second those of the network."""
    from huggingface_hub.utils import tqdm

    first: list[Any] = []

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            if options.get("unit") == "B" and not first:
                first.append(self)

        def update(self, n: float | None = 1) -> None:
            if first and self is first[0]:
                step(int(n or 0))

    return Silent
