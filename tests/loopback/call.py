"""A request as a route sees it, and the answer."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from loopback.faults import Fault
from loopback.git import Refusal
from loopback.state import Hub
from loopback.users import User


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


def xml_reply(refusal: Refusal) -> Reply:
    """As S3 refuses."""
    told = f"<Error><Code>{refusal.code or 'InvalidRequest'}</Code><Message>{escape(refusal.message)}</Message></Error>"
    headers = {name: value for name, value in refusal.headers.items() if not name.startswith("X-Error-")}
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{told}'.encode()
    return Reply(refusal.status, body, {"Content-Type": "application/xml", **headers})


@dataclass
class Call:
    hub: Hub
    query: Mapping[str, list[str]]
    headers: Message
    incoming: Iterator[bytes]  # the body
    fault: Fault
    user: User | None = None  # whose token came with it
    path: str = ""  # as it came

    def body(self) -> bytes:
        return b"".join(self.incoming)

    def json(self) -> Any:
        return json.loads(self.body())

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def page(self, entries: Sequence[Any], most: int) -> Reply:
        """The part of a list that the query asks for, and the address of the next one."""
        size = min(int(self.query.get("limit", [str(most)])[0]), most)
        at = int(base64.urlsafe_b64decode(self.query["cursor"][0])) if "cursor" in self.query else 0
        headers = {}
        if at + size < len(entries):
            cursor = base64.urlsafe_b64encode(str(at + size).encode()).decode()
            query = urlencode(self.query | {"limit": [str(size)], "cursor": [cursor]}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}{self.path}?{query}>; rel="next"'
        return json_reply(list(entries[at : at + size]), headers=headers)

    def ranged(self, length: int, headers: dict[str, str]) -> tuple[int, int, int]:
        """Status, first byte and length for the Range header, if any. As S3, it gives the whole for several ranges."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers["Accept-Ranges"] = "bytes"
        if match is None or match.groups() == ("", ""):
            return 200, 0, length
        first, last = match.groups()
        if (first and last and int(last) < int(first)) or (length == 0 and not first):
            return 200, 0, length  # no range at all, by RFC 9110
        start = int(first) if first else max(0, length - int(last))
        end = min(int(last) + 1, length) if first and last else length
        if start >= end:
            raise Refusal(416, "Range Not Satisfiable", "InvalidRange", **{"Content-Range": f"bytes */{length}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
        return 206, start, end - start
