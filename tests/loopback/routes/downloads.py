"""Files on their way out."""

from __future__ import annotations

import secrets
import time
from urllib.parse import quote

from loopback.call import Call, Reply, json_reply
from loopback.git import Blob, Refusal


def resolve(call: Call, repo: str, revision: str, path: str) -> Reply:
    found = call.hub.content_readable(call.user, repo)
    commit = found.at(revision)
    headers = {"X-Repo-Commit": commit.sha}
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
    if blob.content is None:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Accept-Ranges": "bytes"}
        if call.hub.xet is not None:
            route = f"{call.hub.endpoint}/api/models/{repo}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": call.hub.xet_hash(blob.sha256), "Link": f'<{route}>; rel="xet-auth"'}
        signed = call.hub.signed(f"/cdn/{blob.sha256}")
        return Reply(302, headers=headers | {"Location": f"{signed}&name={quote(path, safe='')}"})
    if blob.size and not (found.private or found.gated):  # from a cache that is open to all
        origin = quote(f"/{repo}/resolve/{revision}/{path}", safe="")
        query = f"{origin}=&etag={quote(chr(34) + blob.oid + chr(34), safe='')}"
        where = f"/api/resolve-cache/models/{repo}/{commit.sha}/{quote(path)}?{query}"
        return Reply(307, headers=headers | {"Accept-Ranges": "bytes", "Location": where})
    return _small(call, blob, headers)


def resolve_cache(call: Call, repo: str, revision: str, path: str) -> Reply:
    """A small file at a commit."""
    found = call.hub.readable(None, repo)
    commit = found.at(revision)
    blob = commit.files.get(path)
    if found.gated or blob is None or blob.content is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    return _small(call, blob, {"X-Repo-Commit": commit.sha})


def _small(call: Call, blob: Blob, headers: dict[str, str]) -> Reply:
    assert blob.content is not None
    status, first, length = call.ranged(blob.size, headers)
    headers |= {"ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"}
    return Reply(status, blob.content[first : first + length], headers)


def download(call: Call, oid: str) -> Reply:
    stored = call.hub.object_path(oid)
    if not stored.exists():
        raise Refusal(404, "The specified key does not exist.", "NoSuchKey")
    headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
    name = quote(call.query.get("name", [oid])[0].rpartition("/")[2])
    headers["Content-Disposition"] = f'inline; filename="{name}";'
    status, first, length = call.ranged(stored.stat().st_size, headers)
    return Reply(status, headers=headers, file=(stored, first, length))


def xet_token(call: Call, repo: str, right: str, revision: str) -> Reply:
    store = call.hub.xet
    if store is None:
        raise Refusal(404, "This Hub has no Xet storage")
    if right == "write":
        call.hub.writable(call.user, repo, through_pull_request=call.flag("create_pr"))
    else:
        call.hub.content_readable(call.user, repo)
    told = {"casUrl": store.url, "accessToken": secrets.token_hex(8), "exp": int(time.time()) + 3600}
    names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
    return json_reply(told, headers=dict(zip(names, map(str, told.values()), strict=True)))
