"""HTTP: takes requests, does what a fault says, and asks the routes.

Large files leave and arrive under the name `localhost`, another origin, as the Hub's own storage does;
an Authorization header that reaches it is an incident.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

from loopback.call import Call, Reply, json_reply, xml_reply
from loopback.faults import Request
from loopback.git import Refusal
from loopback.objects import CHUNK
from loopback.routes import ROUTES
from loopback.state import Hub
from loopback.users import User


class _Cut(Exception):
    pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.hub.incidents.append(f"The server failed: {error!r}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        self.raw_path, _, query = self.path.partition("?")
        path, self.query = unquote(self.raw_path), parse_qs(query)
        self.seen = Request(self.command, path, query, "Authorization" in self.headers)
        if path != "/api/agent-harnesses":  # the client asks for this once a day, whatever one calls
            self.hub.log.append(self.seen)
        self.fault = self.hub.fault_for(self.command, path)
        self.incoming = self._incoming()
        self.on_storage = False
        self.told: dict[str, str] = {}  # headers of every answer
        try:
            self.send(self._reply())
        except _Cut:
            self._close()
        except OSError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _reply(self) -> Reply:
        fault = self.fault
        if fault.before is not None:
            fault.before()
        if self.command in ("POST", "PUT") and fault.cut_after is not None:
            while self.seen.received < fault.cut_after and next(self.incoming, b""):
                pass
            raise _Cut
        if fault.status is not None:
            reply = json_reply(fault.body or {"error": f"Fault {fault.status}"}, fault.status, dict(fault.headers))
        else:
            try:
                reply = self._route()
            except Refusal as refusal:
                if self.on_storage:
                    reply = xml_reply(refusal)
                else:
                    reply = json_reply({"error": refusal.message}, refusal.status, dict(refusal.headers))
            except Exception as error:
                self.hub.incidents.append(f"{self.command} {self.path}: {error!r}")
                reply = json_reply({"error": repr(error)}, 500)
        for _ in self.incoming:  # what an early answer left unread would be taken for the next request
            pass
        if fault.after is not None:
            fault.after()
        if fault.lost:
            raise _Cut
        return reply

    def _close(self) -> None:
        self.close_connection = True
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    # Bodies

    def _incoming(self) -> Iterator[bytes]:
        fault = self.fault
        most, rest = fault.trickle or (CHUNK, 0.0)
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
            if fault.cut_after is not None:
                size = max(1, min(size, fault.cut_after - self.seen.received))
            piece = self.rfile.read(size)
            self.seen.received += len(piece)
            if len(piece) < size:
                raise ConnectionResetError("the client went away")
            left -= size
            if chunked and left == 0:
                self.rfile.readline()
            time.sleep(rest)
            yield piece

    def send(self, reply: Reply) -> None:
        length = reply.length
        self.seen.status = reply.status
        self.send_response(reply.status)
        for name, value in (self.told | reply.headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault
        most, rest = fault.trickle or (CHUNK, 0.0)
        flip = length // 2 if fault.corrupt and length and self.command == "GET" else -1
        cut = fault.cut_after
        at = 0
        for piece in reply.pieces(most):
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

    # Who asks for what

    def _route(self) -> Reply:
        for old, new in self.hub.renamed.items():
            if re.search(rf"/{old}(/|\.git/|$)", self.raw_path):
                return Reply(307, headers={"Location": self.path.replace(f"/{old}", f"/{new}", 1)})
        for route in ROUTES:
            groups = route.match(self.command, self.raw_path)
            if groups is not None:
                user = None
                self.on_storage = route.storage
                if route.storage:
                    self._check_storage_host()
                else:
                    user = self._user()
                    self._limit(user)
                if route.signed:
                    self._check_signature()
                call = Call(self.hub, self.query, self.headers, self.incoming, self.fault, user, self.raw_path)
                answer = route.answer(call, **groups)
                return answer if isinstance(answer, Reply) else json_reply(answer)
        raise Refusal(404, f"The loopback Hub does not serve {self.command} {self.raw_path}")

    def _limit(self, user: User | None) -> None:
        with self.hub.lock:
            allowed, self.told = self.hub.limiter.take(self.raw_path, user or self.client_address[0])
        if not allowed:
            raise Refusal(429, "We had to rate limit you. To continue using our service, slow down or authenticate.")

    def _user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.accounts.user(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _check_storage_host(self) -> None:
        if self.headers.get("Authorization") is not None:
            self.hub.incidents.append(f"A token came to the storage host: {self.command} {self.raw_path}")
            raise Refusal(400, "Only one auth mechanism allowed", "InvalidArgument")
        if not self.headers.get("Host", "").startswith("localhost:"):
            raise Refusal(404, "This is not the storage host", "NoSuchKey")
        if self.command == "PUT" and self.headers.get("Transfer-Encoding") is not None:
            raise Refusal(501, "A header you provided implies functionality that is not implemented", "NotImplemented")
        if self.command == "PUT" and self.headers.get("Content-Length") is None:
            raise Refusal(411, "You must provide the Content-Length HTTP header.", "MissingContentLength")

    def _check_signature(self) -> None:
        expires, signature = (self.query.get(name, [""])[0] for name in ("Expires", "signature"))
        if signature != self.hub.signature(self.raw_path, expires):
            raise Refusal(403, "Access Denied", "AccessDenied")
        if float(expires) <= time.time():
            raise Refusal(403, "Request has expired", "AccessDenied")
