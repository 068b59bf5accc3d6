"""The Hub as its routes see it: the repositories, its address, what goes wrong, and what it saw."""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from loopback.faults import Fault, Request
from loopback.limiter import Limiter
from loopback.repos import Repos


class Hub(Repos):
    def __init__(self, storage: Path, tokens: Mapping[str, str] | None = None, xet: bool = False) -> None:
        super().__init__(storage, tokens, xet)
        self.multipart_above, self.part_size = 1 << 40, 16 << 20
        self.log: list[Request] = []
        self.incidents: list[str] = []
        self.secret = secrets.token_hex(8)
        self.connections: set[socket.socket] = set()
        self.port = 0
        self.limiter = Limiter()
        self.lifetime = 3600.0  # seconds that a signed address is good for
        self.page_size, self.commits_a_page = 1000, 50  # entries in one answer; a client may ask for fewer
        self.has_auth_check = True  # Hubs by others may have none
        self.ignores_unchanged = False  # these may say shouldIgnore of files that the branch holds already
        self.endpoint = ""
        self._faults: list[Fault] = []

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
        expires = str(int(time.time() + self.lifetime))
        return f"{origin}{path}?Expires={expires}&signature={self.signature(path, expires)}"

    def signature(self, path: str, expires: str) -> str:
        return hashlib.sha256((self.secret + path + expires).encode()).hexdigest()[:32]
