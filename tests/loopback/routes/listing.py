"""What a repository holds, and what happened to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs

from loopback.call import Call
from loopback.git import Blob, Commit, Refusal, Repo
from loopback.routes.card import front_matter


def info(call: Call, repo: str, revision: str = "main") -> Any:
    found = call.hub.readable(call.user, repo)
    commit = found.at(revision)
    card: dict[str, Any] = {}
    if "README.md" in commit.files:
        with contextlib.suppress(Exception):  # as the Hub, which shows a warning instead
            card = front_matter(call.hub.read(repo, "README.md", commit.sha).decode())
    siblings = [_sibling(call, path, blob) for path, blob in commit.files.items()]
    tags = [*card.get("tags", []), *([card["library_name"]] if "library_name" in card else [])]
    tags += [f"{key}:{value}" for key in ("base_model", "license") for value in _listed(card.get(key))]
    info: dict[str, Any] = {"_id": found.id, "id": found.id, "modelId": found.id, "author": found.owner}
    info |= {"sha": commit.sha, "private": found.private, "gated": "auto" if found.gated else False}
    info |= {
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "lastModified": commit.date,
        "createdAt": commit.date,
    }
    info |= {"siblings": siblings} | ({"cardData": card} if card else {})
    wanted = call.query.get("expand")
    return {key: info[key] for key in info if wanted is None or key in ("_id", "id", "modelId", *wanted)}


def tree(call: Call, repo: str, revision: str, path: str) -> Any:
    found = call.hub.readable(call.user, repo)
    commit = found.at(revision)
    inside = path.strip("/") + "/" if path else ""
    listed: dict[str, dict[str, Any]] = {}
    for name in commit.files:
        if not name.startswith(inside):
            continue
        steps = name[len(inside) :].split("/")
        for depth in range(1, len(steps) if call.flag("recursive") else min(2, len(steps))):
            folder = inside + "/".join(steps[:depth])
            listed.setdefault(folder, _folder(folder))
        if len(steps) == 1 or call.flag("recursive"):
            listed[name] = _described(call, found, commit, name, call.flag("expand"))
    if inside and not listed:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return call.page(list(listed.values()), 100 if call.flag("expand") else call.hub.page_size)


def paths_info(call: Call, repo: str, revision: str) -> Any:
    found = call.hub.readable(call.user, repo)
    commit = found.at(revision)
    body = call.body().decode()
    told = json.loads(body) if body.startswith("{") else parse_qs(body)
    expand = told.get("expand") in (True, ["true"], ["True"])
    answer = []
    for path in dict.fromkeys(name.strip("/") for name in told.get("paths", [])):
        if path in commit.files:
            answer.append(_described(call, found, commit, path, expand))
        elif any(name.startswith(path + "/") for name in commit.files):
            answer.append(_folder(path))
    return answer


def refs(call: Call, repo: str) -> Any:
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, sha in call.hub.readable(call.user, repo).branches.items():
        pull = name.startswith("refs/pr/")
        told = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": sha}
        answer["pullRequests" if pull else "branches"].append(told)
    if not call.flag("include_prs"):
        del answer["pullRequests"]
    return answer


def commits(call: Call, repo: str, revision: str) -> Any:
    found = call.hub.readable(call.user, repo)
    keys = [(old.sha, old.author, old.date, old.title, old.description) for old in found.history(found.at(revision))]
    told = [
        {"id": sha, "authors": [{"user": author}], "date": date, "title": title, "message": text}
        for sha, author, date, title, text in keys
    ]
    return call.page(told, call.hub.commits_a_page)


def discussions(call: Call, repo: str) -> Any:
    found = call.hub.readable(call.user, repo)
    pulls = [name for name in found.branches if name.startswith("refs/pr/")]
    told = [
        {
            "num": int(name.rsplit("/", 1)[1]),
            "title": found.at(name).title,
            "author": {"name": found.at(name).author},
            "createdAt": found.at(name).date,
            "status": "open",
            "repo": {"name": found.id, "type": "model"},
            "isPullRequest": True,
        }
        for name in reversed(pulls)
    ]
    return {"discussions": told, "count": len(told), "start": 0}


def _sibling(call: Call, path: str, blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": path}
    if call.flag("blobs"):
        told |= {"size": blob.size, "blobId": blob.oid}
        if blob.content is None:
            told["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return told


def _described(call: Call, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    blob = commit.files[path]
    told: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.content is None:
        told["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        if not call.hub.no_xet:
            told["xetHash"] = call.hub.xet_hash(blob.sha256)
    if expand:
        last = repo.last_change(commit, path)
        told["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return told


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
