"""A request as a route sees it, and the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

from loopback.faults import Fault
from loopback.git import Refusal
from loopback.state import Hub


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: tuple[Path, int, int] | None = None  # path, first byte, length: instead of `body`

    @property
    def length(self) -> int:
        return len(self.body) if self.file is None else self.file[2]

    def pieces(self, most: int) -> Iterable[bytes]:
        """The body, at most so many bytes at a time."""
        if self.file is None:
            for start in range(0, max(1, len(self.body)), most):
                yield self.body[start : start + most]
            return
        path, first, left = self.file
        with path.open("rb") as file:
            file.seek(first)
            while left > 0:
                piece = file.read(min(left, most))
                left -= len(piece)
                yield piece


def json_reply(value: Any, status: int = 200, headers: Any = None, content_type: str = "application/json") -> Reply:
    body = json.dumps(value, default=str).encode()  # a card may hold a date
    return Reply(status, body, {"Content-Type": content_type, **(headers or {})})


@dataclass
class Call:
    hub: Hub
    query: Mapping[str, list[str]]
    headers: Message
    incoming: Iterator[bytes]  # the body
    fault: Fault
    user: str | None = None  # whose token came with it

    def body(self) -> bytes:
        return b"".join(self.incoming)

    def json(self) -> Any:
        return json.loads(self.body())

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def ranged(self, length: int, headers: dict[str, str]) -> tuple[int, int, int]:
        """Status, first byte and length for the Range header, if any; only one range is served."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers["Accept-Ranges"] = "bytes"
        if match is None or match.groups() == ("", ""):
            return 200, 0, length
        first, last = match.groups()
        start = int(first) if first else max(0, length - int(last))
        end = min(int(last) + 1, length) if first and last else length
        if start >= end:
            raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{length}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
        return 206, start, end - start
