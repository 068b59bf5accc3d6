"""A Hugging Face Hub on 127.0.0.1 for the real client, which misbehaves on demand.

Large files leave and arrive under the name `localhost`, another origin, as the Hub's own storage does;
an Authorization header that reaches it is an incident.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from loopback_repos import CHUNK, Blob, Commit, Refusal, Repo, Repos, upload_mode

if TYPE_CHECKING:
    import pytest


@dataclass
class Fault:
    """What goes wrong with the requests it matches; the first fault that has not run out is the one that happens.

    `times` and `skip` count down in place, so that `fault.times == 0` tells that it happened.
    """

    method: str | None = None
    path: str = ""  # searched in the unquoted path
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    times: int | None = 1  # None: for ever
    skip: int = 0  # let so many matching requests pass first
    # Close after so many body bytes: of the answer to a GET, or of what a POST or PUT sends, without effect or answer.
    cut_after: int | None = None
    reset: bool = False  # cut an answer with a TCP reset, not with an orderly end
    corrupt: bool = False  # one byte of the answer's body, or of the stored upload
    trickle: tuple[int, float] | None = None  # (bytes, seconds of rest after them)
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    lost: bool = False  # the request has its effect, the connection is closed without an answer


@dataclass
class Request:
    method: str
    path: str
    query: str
    has_token: bool
    status: int | None = None  # None: there was no answer
    sent: int = 0  # body bytes of the answer
    received: int = 0  # body bytes of the request


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: tuple[Path, int, int] | None = None  # path, first byte, length: instead of `body`


class _Cut(Exception):
    pass


class LoopbackHub(Repos):
    def __init__(
        self,
        storage: Path,
        tokens: Mapping[str, str] | None = None,
        multipart_above: int = 1 << 40,
        xet: bool = False,
    ) -> None:
        super().__init__(storage, tokens, xet)
        self.multipart_above, self.part_size = multipart_above, max(1, min(multipart_above, 16 << 20))
        self.log: list[Request] = []
        self.incidents: list[str] = []
        self.secret = secrets.token_hex(8)
        self.connections: set[socket.socket] = set()
        self.when_stopped: list[Callable[[], object]] = []
        self._faults: list[Fault] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        for close in self.when_stopped:
            close()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):  # kept alive by the client
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fault(self, fault: Fault) -> None:
        self._faults.append(fault)

    def clear_faults(self) -> None:
        self._faults.clear()

    def reset_log(self) -> None:
        self.log.clear()

    def moved(self) -> tuple[int, int]:
        """Body bytes sent to the client, and received from it."""
        return sum(request.sent for request in self.log), sum(request.received for request in self.log)

    def fault_for(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self._faults:
                if fault.times == 0 or fault.method not in (None, method) or not re.search(fault.path, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return Fault()

    def signed(self, path: str, elsewhere: bool = True) -> str:
        """A url that needs no token, on the storage host or on the Hub itself."""
        origin = f"http://localhost:{self.port}" if elsewhere else self.endpoint
        return f"{origin}{path}?signature={self.signature(path)}"

    def signature(self, path: str) -> str:
        return hashlib.sha256((self.secret + path).encode()).hexdigest()[:32]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.hub.incidents.append(f"The server failed: {error!r}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        self.raw_path, _, query = self.path.partition("?")
        path, self.query = unquote(self.raw_path), parse_qs(query)
        self.seen = Request(self.command, path, query, "Authorization" in self.headers)
        if path != "/api/agent-harnesses":  # the client asks for this once a day, whatever one calls
            self.hub.log.append(self.seen)
        self.wrong = self.hub.fault_for(self.command, path)
        self.incoming = self._incoming()
        try:
            self._send(self._reply())
        except _Cut:
            self._close()
        except OSError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _reply(self) -> Reply:
        wrong = self.wrong
        if wrong.before is not None:
            wrong.before()
        if self.command in ("POST", "PUT") and wrong.cut_after is not None:
            while self.seen.received < wrong.cut_after and next(self.incoming, b""):
                pass
            raise _Cut
        if wrong.status is not None:
            reply = _json(wrong.body or {"error": f"Fault {wrong.status}"}, wrong.status, dict(wrong.headers))
        else:
            try:
                reply = self._route()
            except Refusal as refusal:
                reply = _json({"error": refusal.message}, refusal.status, dict(refusal.headers))
            except Exception as error:
                self.hub.incidents.append(f"{self.command} {self.path}: {error!r}")
                reply = _json({"error": repr(error)}, 500)
        for _ in self.incoming:  # what an early answer left unread would be taken for the next request
            pass
        if wrong.after is not None:
            wrong.after()
        if wrong.lost:
            raise _Cut
        return reply

    def _close(self) -> None:
        self.close_connection = True
        if self.wrong.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    # Bodies

    def _incoming(self) -> Iterator[bytes]:
        wrong = self.wrong
        most, rest = wrong.trickle or (CHUNK, 0.0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = 0 if chunked else int(self.headers.get("Content-Length") or 0)
        while True:
            if chunked and left == 0:
                left = int(self.rfile.readline().split(b";")[0], 16)
                if left == 0:
                    self.rfile.readline()
            if left == 0:
                return
            size = min(left, most)
            if wrong.cut_after is not None:
                size = max(1, min(size, wrong.cut_after - self.seen.received))
            piece = self.rfile.read(size)
            self.seen.received += len(piece)
            if len(piece) < size:
                raise ConnectionResetError("the client went away")
            left -= size
            if chunked and left == 0:
                self.rfile.readline()
            time.sleep(rest)
            yield piece

    def _json_body(self) -> Any:
        return json.loads(b"".join(self.incoming))

    def _send(self, reply: Reply) -> None:
        length = len(reply.body) if reply.file is None else reply.file[2]
        self.seen.status = reply.status
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        wrong = self.wrong
        most, rest = wrong.trickle or (CHUNK, 0.0)
        flip = length // 2 if wrong.corrupt and length and self.command == "GET" else -1
        cut = wrong.cut_after
        at = 0
        for piece in _pieces(reply, most):
            if at <= flip < at + len(piece):
                piece = piece[: flip - at] + bytes([piece[flip - at] ^ 1]) + piece[flip - at + 1 :]
            if cut is not None:
                piece = piece[: max(0, cut - at)]
            at += len(piece)
            self.seen.sent += len(piece)
            self.wfile.write(piece)
            if cut is not None and at >= cut:
                raise _Cut
            time.sleep(rest)

    def _ranged(self, length: int, headers: dict[str, str]) -> tuple[int, int, int]:
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

    # Who asks for what

    def _route(self) -> Reply:
        for old, new in self.hub.renamed.items():
            if re.search(rf"/{old}(/|\.git/|$)", self.raw_path):
                return Reply(307, headers={"Location": self.path.replace(f"/{old}", f"/{new}", 1)})
        for methods, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, self.raw_path)
            if match is not None and self.command in methods:
                if name in ("download", "store"):
                    self._check_storage_host()
                    self.user = None
                else:
                    self.user = self._user()
                if name in ("download", "store", "complete"):
                    self._check_signature()
                answer = getattr(self, name)(**{key: unquote(value or "") for key, value in match.groupdict().items()})
                return answer if isinstance(answer, Reply) else _json(answer)
        raise Refusal(404, f"The loopback Hub does not serve {self.command} {self.raw_path}")

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _check_storage_host(self) -> None:
        if self.headers.get("Authorization") is not None:
            self.hub.incidents.append(f"A token came to the storage host: {self.command} {self.raw_path}")
            raise Refusal(400, "Only one auth mechanism allowed")
        if not self.headers.get("Host", "").startswith("localhost:"):
            raise Refusal(404, "This is not the storage host")

    def _check_signature(self) -> None:
        if self.query.get("signature") != [self.hub.signature(self.raw_path)]:
            raise Refusal(403, "Access denied")

    # Account and repositories

    def whoami(self) -> Any:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}

    def harnesses(self) -> Any:
        return {"standardEnvVars": [], "harnesses": {}}

    def create_repo(self) -> Any:
        told = self._json_body()
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{told.get('organization') or self.user}/{told['name']}"
        if told.get("type", "model") != "model":
            raise Refusal(400, "The loopback Hub has models only")
        if repo_id.split("/")[0] != self.user:
            owner = repo_id.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos():
                return _json({"error": "You already created this model repo", **answer}, 409)
            self.hub.create(repo_id, private=told.get("visibility") == "private" or bool(told.get("private")))
        return answer

    def validate_yaml(self) -> Any:
        import yaml

        try:
            card = front_matter(self._json_body()["content"])
        except (yaml.YAMLError, ValueError) as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warned = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warned}

    def auth_check(self, repo: str, write: str) -> Any:
        (self.hub.writable if write else self.hub.content_readable)(self.user, repo)
        return {}

    def info(self, repo: str, revision: str = "main") -> Any:
        found = self.hub.readable(self.user, repo)
        commit = found.at(revision)
        card: dict[str, Any] = {}
        if "README.md" in commit.files:
            with contextlib.suppress(Exception):  # as the Hub, which shows a warning instead
                card = front_matter(self.hub.read(repo, "README.md", commit.sha).decode())
        siblings = [self._sibling(path, blob) for path, blob in commit.files.items()]
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
        wanted = self.query.get("expand")
        return {key: info[key] for key in info if wanted is None or key in ("_id", "id", "modelId", *wanted)}

    def _sibling(self, path: str, blob: Blob) -> dict[str, Any]:
        told: dict[str, Any] = {"rfilename": path}
        if self._flag("blobs"):
            told |= {"size": blob.size, "blobId": blob.oid}
            if blob.content is None:
                told["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        return told

    def tree(self, repo: str, revision: str, path: str) -> Any:
        found = self.hub.readable(self.user, repo)
        commit = found.at(revision)
        inside = path.strip("/") + "/" if path else ""
        listed: dict[str, dict[str, Any]] = {}
        for name in commit.files:
            if not name.startswith(inside):
                continue
            steps = name[len(inside) :].split("/")
            for depth in range(1, len(steps) if self._flag("recursive") else min(2, len(steps))):
                folder = inside + "/".join(steps[:depth])
                listed.setdefault(folder, _folder(folder))
            if len(steps) == 1 or self._flag("recursive"):
                listed[name] = self._described(found, commit, name, self._flag("expand"))
        if inside and not listed:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return list(listed.values())

    def paths_info(self, repo: str, revision: str) -> Any:
        found = self.hub.readable(self.user, repo)
        commit = found.at(revision)
        body = b"".join(self.incoming).decode()
        told = json.loads(body) if body.startswith("{") else parse_qs(body)
        expand = told.get("expand") in (True, ["true"], ["True"])
        answer = []
        for path in dict.fromkeys(name.strip("/") for name in told.get("paths", [])):
            if path in commit.files:
                answer.append(self._described(found, commit, path, expand))
            elif any(name.startswith(path + "/") for name in commit.files):
                answer.append(_folder(path))
        return answer

    def _described(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        blob = commit.files[path]
        told: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.content is None:
            told["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            if not self.hub.no_xet:
                told["xetHash"] = self.hub.xet_hash(blob.sha256)
        if expand:
            last = repo.last_change(commit, path)
            told["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return told

    def refs(self, repo: str) -> Any:
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in self.hub.readable(self.user, repo).branches.items():
            pull = name.startswith("refs/pr/")
            told = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": sha}
            answer["pullRequests" if pull else "branches"].append(told)
        if not self._flag("include_prs"):
            del answer["pullRequests"]
        return answer

    def commits(self, repo: str, revision: str) -> Any:
        found = self.hub.readable(self.user, repo)
        keys = [
            (old.sha, old.author, old.date, old.title, old.description) for old in found.history(found.at(revision))
        ]
        return [
            {"id": sha, "authors": [{"user": author}], "date": date, "title": title, "message": text}
            for sha, author, date, title, text in keys
        ]

    def discussions(self, repo: str) -> Any:
        found = self.hub.readable(self.user, repo)
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

    def branch(self, repo: str, branch: str) -> Any:
        told = self._json_body()
        found = self.hub.writable(self.user, repo)
        with self.hub.lock:
            if branch in found.branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
            found.branches[branch] = found.at(told.get("startingPoint") or "main").sha
        return {}

    # Downloads

    def resolve(self, repo: str, revision: str, path: str) -> Reply:
        found = self.hub.content_readable(self.user, repo)
        commit = found.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if blob.content is None:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Accept-Ranges": "bytes"}
            if self.hub.xet is not None:
                route = f"{self.hub.endpoint}/api/models/{repo}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": self.hub.xet_hash(blob.sha256), "Link": f'<{route}>; rel="xet-auth"'}
            signed = self.hub.signed(f"/cdn/{blob.sha256}")
            return Reply(302, headers=headers | {"Location": f"{signed}&name={quote(path, safe='')}"})
        status, first, length = self._ranged(blob.size, headers)
        headers |= {"ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        return Reply(status, blob.content[first : first + length], headers)

    def download(self, oid: str) -> Reply:
        stored = self.hub.object_path(oid)
        if not stored.exists():
            raise Refusal(404, "No such object")
        headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        name = quote(self.query.get("name", [oid])[0].rpartition("/")[2])
        headers["Content-Disposition"] = f'inline; filename="{name}";'
        status, first, length = self._ranged(stored.stat().st_size, headers)
        return Reply(status, headers=headers, file=(stored, first, length))

    def xet_token(self, repo: str, right: str, revision: str) -> Reply:
        store = self.hub.xet
        if store is None:
            raise Refusal(404, "This Hub has no Xet storage")
        if right == "write":
            self.hub.writable(self.user, repo, through_pull_request=self._flag("create_pr"))
        else:
            self.hub.content_readable(self.user, repo)
        told = {"casUrl": store.url, "accessToken": secrets.token_hex(8), "exp": int(time.time()) + 3600}
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        return _json(told, headers=dict(zip(names, map(str, told.values()), strict=True)))

    # Uploads

    def preupload(self, repo: str, revision: str) -> Any:
        found = self.hub.writable(self.user, repo, through_pull_request=self._flag("create_pr"))
        present = found.at(revision).files
        answer = []
        for file in self._json_body()["files"]:
            path, blob = file["path"], present.get(file["path"])
            told = {"path": path, "uploadMode": upload_mode(path, file["size"]), "shouldIgnore": False}
            if blob is not None:
                told["oid"] = blob.sha256 if blob.content is None else blob.oid
            answer.append(told)
        return {"files": answer}

    def lfs_batch(self, repo: str) -> Any:
        told = self._json_body()
        # The client leaves the revision out for a pull request, which needs no right to write.
        found = self.hub.writable(self.user, repo, through_pull_request="ref" not in told)
        objects, transfer = [], "basic"
        for item in told["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            objects.append(answer)
            if self.hub.size_of(found, oid) == size:
                continue
            base = f"/storage/{repo}/{oid}"
            upload: dict[str, Any] = {"href": self.hub.signed(f"{base}/{size}/0")}
            if size > self.hub.multipart_above and "multipart" in told.get("transfers", []):
                transfer, most = "multipart", self.hub.part_size
                sizes = [min(most, size - start) for start in range(0, size, most)]
                urls = {f"{n:05}": self.hub.signed(f"{base}/{part}/{n}") for n, part in enumerate(sizes, 1)}
                href = self.hub.signed(f"/api/complete_multipart/{repo}/{oid}/{size}", elsewhere=False)
                upload = {"href": href, "header": {"chunk_size": str(most), **urls}}
            verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": transfer, "objects": objects}, content_type="application/vnd.git-lfs+json")

    def store(self, repo: str, oid: str, size: str, part: str) -> Reply:
        etag = self.hub.receive(repo, oid, int(size), int(part), self.incoming, self.wrong.corrupt)
        return Reply(headers={"ETag": f'"{etag}"'})

    def complete(self, repo: str, oid: str, size: str) -> Any:
        self.hub.join(repo, oid, int(size), self._json_body()["parts"])
        return {"success": True}

    def verify(self, repo: str) -> Any:
        told = self._json_body()
        self.hub.verify(self.hub.writable(self.user, repo, through_pull_request=True), told["oid"], told["size"])
        return {}

    def duplicate(self, repo: str) -> Any:
        told = self._json_body()
        target = self.hub.writable(self.user, told["target"]["name"])
        return self.hub.duplicate(self.hub.content_readable(self.user, repo), target, told["files"])

    def commit(self, repo: str, revision: str) -> Any:
        pull = self._flag("create_pr")
        found = self.hub.writable(self.user, repo, through_pull_request=pull)
        lines = [json.loads(line) for line in b"".join(self.incoming).splitlines() if line.strip()]
        branch, made = self.hub.push(found, revision, lines, str(self.user), pull)
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.sha}"}
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{branch.rsplit('/', 1)[1]}"
        return answer

    def _flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL, _REV = f"/api/models/{_REPO}", "(?P<revision>[^/]+)"
_OBJECT = f"{_REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<size>[0-9]+)"
_ROUTES: list[tuple[str, str, str]] = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("GET", "/api/agent-harnesses", "harnesses"),
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/complete_multipart/{_OBJECT}", "complete"),
    ("GET", _MODEL, "info"),
    ("GET", f"{_MODEL}/revision/{_REV}", "info"),
    ("GET", f"{_MODEL}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", f"{_MODEL}/tree/{_REV}(?:/(?P<path>.*))?", "tree"),
    ("POST", f"{_MODEL}/paths-info/{_REV}", "paths_info"),
    ("GET", f"{_MODEL}/refs", "refs"),
    ("GET", f"{_MODEL}/commits/{_REV}", "commits"),
    ("GET", f"{_MODEL}/discussions", "discussions"),
    ("POST", f"{_MODEL}/branch/(?P<branch>[^/]+)", "branch"),
    ("GET", f"{_MODEL}/xet-(?P<right>read|write)-token/{_REV}", "xet_token"),
    ("POST", f"{_MODEL}/preupload/{_REV}", "preupload"),
    ("POST", f"{_MODEL}/lfs-files/duplicate", "duplicate"),
    ("POST", f"{_MODEL}/commit/{_REV}", "commit"),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", f"/{_REPO}\\.git/info/lfs/verify", "verify"),
    ("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", "download"),
    ("PUT", f"/storage/{_OBJECT}/(?P<part>[0-9]+)", "store"),
]


def _json(value: Any, status: int = 200, headers: Any = None, content_type: str = "application/json") -> Reply:
    body = json.dumps(value, default=str).encode()  # a card may hold a date
    return Reply(status, body, {"Content-Type": content_type, **(headers or {})})


def _pieces(reply: Reply, most: int) -> Iterable[bytes]:
    if reply.file is None:
        for start in range(0, max(1, len(reply.body)), most):
            yield reply.body[start : start + most]
        return
    path, first, left = reply.file
    with path.open("rb") as file:
        file.seek(first)
        while left > 0:
            piece = file.read(min(left, most))
            left -= len(piece)
            yield piece


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def front_matter(text: str) -> dict[str, Any]:
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    card = yaml.safe_load(match[1]) if match else {}
    if not isinstance(card or {}, dict):
        raise ValueError("The metadata of a card must be a mapping")
    return card or {}


def environment(hub: LoopbackHub, home: Path, token: str | None = None) -> dict[str, str]:
    """The whole environment of a child process whose client uses this Hub; it inherits nothing about the real one."""
    mine = {key: value for key, value in os.environ.items() if not re.match(r"HF_|HUGGING|TRANSFORMERS_OFFLINE", key)}
    mine |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    mine |= {"HF_HUB_DISABLE_XET": "1" if hub.xet is None else "0"}
    mine |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    return mine if token is None else mine | {"HF_TOKEN": token}


def point_client_at(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path, token: str | None = None) -> None:
    """Make the client of this process use the Hub, whatever it read from the environment when it was imported."""
    from huggingface_hub import _tree_cache, close_session, constants, file_download, hf_api
    from huggingface_hub.utils import _detect_agent, _http

    def put(module: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value, raising=False)

    put(
        constants,
        ENDPOINT=hub.endpoint,
        HUGGINGFACE_CO_URL_TEMPLATE=hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        HF_URL_HOSTS=constants.HF_URL_HOSTS | {"127.0.0.1"},
        HF_HUB_OFFLINE=False,
        HF_HUB_DISABLE_XET=True,
        HF_HUB_DISABLE_PROGRESS_BARS=True,
        HF_HUB_DISABLE_TELEMETRY=True,
        HF_HUB_DISABLE_IMPLICIT_TOKEN=False,
        HF_HOME=str(home),
        HF_HUB_CACHE=str(home / "hub"),
        HUGGINGFACE_HUB_CACHE=str(home / "hub"),
        HF_ASSETS_CACHE=str(home / "assets"),
        HF_XET_CACHE=str(home / "xet"),
        HF_TOKEN_PATH=str(home / "token"),
        HF_STORED_TOKENS_PATH=str(home / "stored_tokens"),
        AGENT_HARNESSES_PATH=str(home / ".agent_harnesses.json"),
    )
    # The retries of the client sleep for seconds; `time` itself stays as it is for everybody else.
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    close_session()
    hub.when_stopped.append(close_session)
    put(_http, time=quick)
    if hasattr(_http, "_HUB_ORIGINS"):  # late clients know their Hub by it
        put(_http, _HUB_ORIGINS=_http._HUB_ORIGINS | {_http._url_origin(hub.endpoint)})
    put(file_download, time=quick)
    put(hf_api.api, endpoint=hub.endpoint)  # behind the module-level functions, made at import
    # Three modules hold settings by value.
    put(import_module("huggingface_hub.utils.tqdm"), HF_HUB_DISABLE_PROGRESS_BARS=True)
    put(import_module("huggingface_hub.utils._cache_manager"), HF_HUB_CACHE=str(home / "hub"))
    put(import_module("huggingface_hub.utils._cache_assets"), HF_ASSETS_CACHE=str(home / "assets"))
    put(_tree_cache, _IN_MEMORY_TREE_CACHE={})
    put(_detect_agent, _registry=_detect_agent._EMPTY_REGISTRY)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}.items():
        monkeypatch.setenv(name, value)
