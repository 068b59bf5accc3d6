"""Files on their way in, branches and commits."""

from __future__ import annotations

import base64
import json
from typing import Any

from loopback.attributes import is_ignored, upload_mode
from loopback.call import Call, Reply, json_reply
from loopback.git import Blob, Refusal
from loopback.names import check_branch, check_path
from loopback.routes.card import refuse_card


def branch(call: Call, repo: str, branch: str) -> Any:
    told = call.json()
    found = call.hub.writable(call.user, repo)
    check_branch(branch)
    with call.hub.lock:
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        found.branches[branch] = found.at(told.get("startingPoint") or "main").sha
    return {}


def preupload(call: Call, repo: str, revision: str) -> Any:
    found = call.hub.writable(call.user, repo, through_pull_request=call.flag("create_pr"))
    commit, asked = found.at(revision), call.json()
    present, attributes = commit.files, found.attributes(commit)
    ignoring = asked.get("gitIgnore") or (present.get(".gitignore", Blob.regular(b"")).content or b"").decode()
    answer = []
    for file in asked["files"]:
        path, blob = file["path"], present.get(file["path"])
        check_path(path)
        sample = base64.b64decode(file["sample"])
        mode = upload_mode(path, file["size"], sample, attributes)
        same = blob is not None and blob.size == file["size"] and call.hub.ignores_unchanged
        told = {"path": path, "uploadMode": mode, "shouldIgnore": same or is_ignored(path, ignoring)}
        if blob is not None:
            told["oid"] = blob.sha256 if blob.content is None else blob.oid
        answer.append(told)
    return {"files": answer}


def lfs_batch(call: Call, repo: str) -> Any:
    told = call.json()
    # The client leaves the revision out for a pull request, which needs no right to write.
    found = call.hub.writable(call.user, repo, through_pull_request="ref" not in told)
    objects, transfer = [], "basic"
    for item in told["objects"]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        objects.append(answer)
        if call.hub.size_of(found, oid) == size:
            continue
        base = f"/storage/{repo}/{oid}"
        upload: dict[str, Any] = {"href": call.hub.signed(f"{base}/{size}/0")}
        if size > call.hub.multipart_above and "multipart" in told.get("transfers", []):
            transfer, most = "multipart", call.hub.part_size
            sizes = [min(most, size - start) for start in range(0, size, most)]
            urls = {f"{n:05}": call.hub.signed(f"{base}/{part}/{n}") for n, part in enumerate(sizes, 1)}
            href = call.hub.signed(f"/api/complete_multipart/{repo}/{oid}/{size}", elsewhere=False)
            upload = {"href": href, "header": {"chunk_size": str(most), **urls}}
        verify = {"href": f"{call.hub.endpoint}/{repo}.git/info/lfs/verify"}
        answer["actions"] = {"upload": upload, "verify": verify}
    return json_reply({"transfer": transfer, "objects": objects}, content_type="application/vnd.git-lfs+json")


def store(call: Call, repo: str, oid: str, size: str, part: str) -> Reply:
    etag = call.hub.receive(repo, oid, int(size), int(part), call.incoming, call.fault.corrupt)
    return Reply(headers={"ETag": f'"{etag}"'})


def complete(call: Call, repo: str, oid: str, size: str) -> Any:
    call.hub.join(repo, oid, int(size), call.json()["parts"])
    return {"success": True}


def verify(call: Call, repo: str) -> Any:
    told = call.json()
    call.hub.verify(call.hub.writable(call.user, repo, through_pull_request=True), told["oid"], told["size"])
    return {}


def duplicate(call: Call, repo: str) -> Any:
    told = call.json()
    target = call.hub.writable(call.user, told["target"]["name"])
    return call.hub.duplicate(call.hub.content_readable(call.user, repo), target, told["files"])


def commit(call: Call, repo: str, revision: str) -> Any:
    pull = call.flag("create_pr")
    found = call.hub.writable(call.user, repo, through_pull_request=pull)
    lines = [json.loads(line) for line in call.body().splitlines() if line.strip()]
    refuse_card(lines)
    branch, made = call.hub.push(found, revision, lines, str(call.user), pull)
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{call.hub.endpoint}/{repo}/commit/{made.sha}"}
    if pull:
        answer["pullRequestUrl"] = f"{call.hub.endpoint}/{repo}/discussions/{branch.rsplit('/', 1)[1]}"
    return answer
