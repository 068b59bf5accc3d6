"""The plan of a streamed merge: how each file of the merged model gets to the Hub, and what disk that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._shown import line, readable_bytes, table
from fossil_export.checkpoints._companions import CARD
from fossil_export.errors import OutputError
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._run import in_place
from fossil_export.storage.hub._remote import HubFolder
from fossil_export.storage.hub._xet import index_bytes

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Move:
    """One weights file. `way` is "copy" (untouched, copied by the Hub), "send" (untouched, from the local base),
    "change" (fetched, merged where it lies) or "write" (written anew from `sources`, files of the base).

    `disk` is what lies on the disk while it is done and `fetch` what comes from the Hub for it, in bytes; `drop` are
    sources that no later file is written from.
    """

    file: FilePlan
    way: str
    sources: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    disk: int = 0
    fetch: int = 0


@dataclass(frozen=True)
class StreamPlan:
    """A merge to the Hub, file by file, as `plan_stream` decides it.

    Attributes:
        merge: The `MergePlan` behind it.
        moves: The weights files, and the way of each: "copy", "send", "change" or "write".
        max_disk: The most bytes that may be on the disk at once, None for no limit.
    """

    merge: MergePlan
    moves: tuple[Move, ...]
    max_disk: int | None = None

    def __repr__(self) -> str:
        return line("StreamPlan", f"of {len(self.moves)} files, {self.disk:,} bytes of disk at most; {self.merge!r}")

    def _repr_html_(self) -> str:
        rows = [
            ("adapter", " + ".join(adapter.name for adapter in self.merge.adapters)),
            ("base", self.merge.base_name),
            ("files", len(self.moves)),
            ("to fetch", readable_bytes(self.fetched)),
            ("to send", readable_bytes(self.nbytes("send", "change", "write"))),
            ("copied on the Hub", readable_bytes(self.nbytes("copy"))),
            ("disk", f"{readable_bytes(self.disk)} at most"),
        ]
        return table("Plan of a merge to the Hub", rows, self.merge.warnings)

    @property
    def remote(self) -> HubFolder | None:
        """The base's repository, None for a base on this machine."""
        home = self.merge.base.home
        return home if isinstance(home, HubFolder) else None

    @property
    def disk(self) -> int:
        """The most bytes on the disk at any time: the files at hand, and what stays in the Hub's caches."""
        return max((move.disk for move in self.moves), default=0) + self.kept

    @property
    def kept(self) -> int:
        """Bytes in the Hub's caches: adapters from there, the base's small files, the index of uploads."""
        uploads = (move.file.size for move in self.moves if move.way != "copy")
        return self.adapter_bytes + self.small_bytes + index_bytes(uploads)

    @property
    def small_bytes(self) -> int:
        """Of the base's files beside its weights that come here; those outside of git are copied on the Hub."""
        if (remote := self.remote) is None:
            return 0
        companions = self.merge.companions
        names = {name for name, path in companions.items() if path == base_path(self.merge, name)}
        names |= {name for name in remote.root_names() if name.endswith(".json") or name == CARD}
        return sum(remote.entries[name].size for name in names if not _is_large(self.merge, name))

    def is_sent(self, name: str) -> bool:
        """Whether a companion goes through this machine: it is not the base's, or the Hub keeps it in git, of which
        it copies nothing."""
        remote, path = self.remote, self.merge.companions[name]
        return remote is None or path != base_path(self.merge, name) or not _is_large(self.merge, name)

    @property
    def adapter_bytes(self) -> int:
        remote = {one.files: one for one in self.merge.adapters if one.revision is not None}.values()
        cards = sum(one.home.size(CARD) for one in remote if CARD in one.home.root_names())
        return sum(one.nbytes for one in remote) + cards

    def count(self, way: str) -> int:
        return sum(move.way == way for move in self.moves)

    def nbytes(self, *ways: str) -> int:
        """Bytes of the merged files that go these ways."""
        return sum(move.file.size for move in self.moves if move.way in ways)

    @property
    def fetched(self) -> int:
        """Bytes to come from the Hub."""
        return sum(move.fetch for move in self.moves)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON shows it."""
        return {
            **self.merge.to_dict(),
            "stream": {
                "files": [
                    {"file": move.file.name, "bytes": move.file.size, "way": move.way, "disk": move.disk}
                    for move in self.moves
                ],
                "bytes_fetched": self.fetched,
                "bytes_uploaded": self.nbytes("send", "change", "write"),
                "bytes_copied": self.nbytes("copy"),
                "disk": self.disk,
            },
        }


def plan_moves(merge: MergePlan, max_disk: int | None = None) -> StreamPlan:
    """Decide how each file of `merge` is published. Raises OutputError where `max_disk` bytes are too few."""
    headers = {header.path.name: header for header in merge.base.files}
    remote = isinstance(merge.base.home, HubFolder)
    ways: list[tuple[FilePlan, str, tuple[str, ...]]] = []
    for file in merge.files:
        header = headers.get(file.name)
        same = header is not None and in_place(file, header)
        untouched = all(tensor.action == "copy" for tensor, _ in file.tensors)
        if same and untouched and (not remote or _is_large(merge, file.name)):
            ways.append((file, "copy" if remote else "send", ()))
        elif same and remote:
            ways.append((file, "change", (file.name,)))
        else:
            ways.append((file, "write", _sources(file) if remote else ()))
    plan = StreamPlan(merge, tuple(_moves(ways, {name: header.size for name, header in headers.items()})), max_disk)
    if max_disk is not None and plan.disk > max_disk:
        most = max(plan.moves, key=lambda move: move.disk)
        raise OutputError(
            f"--max-disk {max_disk:,} is too little: {most.file.name} takes {most.disk:,} bytes at once"
            + (f", the Hub's caches {plan.kept:,}" if plan.kept else "")
            + f"; allow {plan.disk:,}"
        )
    return plan


def _is_large(merge: MergePlan, name: str) -> bool:
    """Whether the Hub keeps a file of the base outside of git, where it can copy it."""
    return len(merge.base.home.blob(name) or "") == 64


def _sources(file: FilePlan) -> tuple[str, ...]:
    """The base's files that `file` is written from."""
    own = [tensor.weight.source for tensor, _ in file.tensors if tensor.owner is None]
    stored = [one for info in own for one in (info.coding.stored if info.coding is not None else (info,))]
    return tuple(sorted({info.path.name for info in stored}))


def _moves(ways: list[tuple[FilePlan, str, tuple[str, ...]]], sizes: Mapping[str, int]) -> list[Move]:
    """With what each leaves on the disk for the ones after it."""
    moves = []
    held: set[str] = set()
    for index, (file, way, sources) in enumerate(ways):
        later = {name for _, other, names in ways[index + 1 :] if other == "write" for name in names}
        fetch = sum(sizes[name] for name in sources if name not in held)
        # A file that is merged where it lies is the base's no more.
        held = held | set(sources) if way == "write" else held - set(sources)
        disk = sum(sizes[name] for name in held) + (file.size if way in ("change", "write") else 0)
        drop = tuple(sorted(held - later))
        held -= set(drop)
        moves.append(Move(file, way, sources, drop, disk, fetch))
    return moves


def base_path(merge: MergePlan, name: str) -> Path:
    """Where the plan has a file of the base."""
    return merge.base.home.path / name
