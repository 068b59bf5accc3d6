"""Which address is answered by which function."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from loopback.routes import account, downloads, listing, uploads


@dataclass(frozen=True)
class Route:
    """`answer` takes the call and the pattern's groups, unquoted; it gives a Reply, or what is sent as JSON."""

    methods: str
    pattern: str  # of the whole path, as it came
    answer: Callable[..., Any]
    storage: bool = False  # on the storage host, which takes no token
    signed: bool = False  # needs the signature of its address

    def match(self, method: str, path: str) -> dict[str, str] | None:
        found = re.fullmatch(self.pattern, path) if method in self.methods.split() else None
        return None if found is None else {key: unquote(value or "") for key, value in found.groupdict().items()}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL, _REV = f"/api/models/{_REPO}", "(?P<revision>[^/]+)"
_OBJECT = f"{_REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<size>[0-9]+)"
ROUTES = [
    Route("GET", "/api/whoami-v2", account.whoami),
    Route("GET", "/api/agent-harnesses", account.harnesses),
    Route("POST", "/api/repos/create", account.create_repo),
    Route("POST", "/api/validate-yaml", account.validate_yaml),
    Route("POST", f"/api/complete_multipart/{_OBJECT}", uploads.complete, signed=True),
    Route("GET", _MODEL, listing.info),
    Route("GET", f"{_MODEL}/revision/{_REV}", listing.info),
    Route("GET", f"{_MODEL}/auth-check(?P<write>/write)?", account.auth_check),
    Route("GET", f"{_MODEL}/tree/{_REV}(?:/(?P<path>.*))?", listing.tree),
    Route("POST", f"{_MODEL}/paths-info/{_REV}", listing.paths_info),
    Route("GET", f"{_MODEL}/refs", listing.refs),
    Route("GET", f"{_MODEL}/commits/{_REV}", listing.commits),
    Route("GET", f"{_MODEL}/discussions", listing.discussions),
    Route("POST", f"{_MODEL}/branch/(?P<branch>[^/]+)", uploads.branch),
    Route("GET", f"{_MODEL}/xet-(?P<right>read|write)-token/{_REV}", downloads.xet_token),
    Route("POST", f"{_MODEL}/preupload/{_REV}", uploads.preupload),
    Route("POST", f"{_MODEL}/lfs-files/duplicate", uploads.duplicate),
    Route("POST", f"{_MODEL}/commit/{_REV}", uploads.commit),
    Route("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", uploads.lfs_batch),
    Route("POST", f"/{_REPO}\\.git/info/lfs/verify", uploads.verify),
    Route("GET HEAD", f"/api/resolve-cache/models/{_REPO}/{_REV}/(?P<path>.+)", downloads.resolve_cache),
    Route("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", downloads.resolve),
    Route("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", downloads.download, storage=True, signed=True),
    Route("PUT", f"/storage/{_OBJECT}/(?P<part>[0-9]+)", uploads.store, storage=True, signed=True),
]
