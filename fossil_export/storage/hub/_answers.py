"""Who gave a refusing answer: the Hub, the host of its large files, or something on the way."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

_SIGNED = re.compile(r"(?:^|&)(?:X-Amz-Signature|Signature|signature|sig|Key-Pair-Id)=")


def address_of(problem: BaseException) -> str:
    """What was asked for, with all that must not be shown; "" if that is not known."""
    return str(getattr(getattr(problem, "response", None), "url", ""))


def is_of_storage(response: Any, endpoint: str) -> bool:
    """Whether it is not from the Hub at `endpoint`, which says why it refuses, but for an address of another host, or
    one that is signed and so needs no token."""
    if "X-Error-Message" in response.headers or "X-Error-Code" in response.headers:
        return False
    address = urlsplit(str(response.url))
    return address.netloc != urlsplit(endpoint).netloc or _SIGNED.search(address.query) is not None


def is_page(problem: BaseException) -> bool:
    """Whether the answer is for a browser; the Hub says what it refuses in headers, and as JSON."""
    headers = getattr(getattr(problem, "response", None), "headers", {})
    return "X-Error-Message" not in headers and headers.get("Content-Type", "").startswith("text/html")


def code_of(problem: BaseException) -> str:
    """What S3 calls its refusal, in the XML of the answer; "" if nothing is known."""
    try:
        found = re.search(r"<Code>(\w{1,60})</Code>", getattr(problem, "response", None).text)  # type: ignore[union-attr]
    except Exception:  # it was not read, and its connection is closed by now
        return ""
    return found[1] if found else ""
