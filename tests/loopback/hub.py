"""The Hub that tests start."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from loopback.server import Server
from loopback.state import Hub


class LoopbackHub(Hub):
    """A Hugging Face Hub on 127.0.0.1, running within `with`.

    `tokens` are those it knows, with their users. LFS files of more than `multipart_above` bytes are uploaded in
    parts. With `xet`, large files go by hf_xet.
    """

    def __init__(
        self,
        storage: Path,
        tokens: Mapping[str, str] | None = None,
        multipart_above: int = 1 << 40,
        xet: bool = False,
    ) -> None:
        super().__init__(storage, tokens, xet)
        self.multipart_above, self.part_size = multipart_above, max(1, min(multipart_above, self.part_size))
        self.when_stopped: list[Callable[[], object]] = []
        self.server = Server(self)
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        for close in self.when_stopped:
            close()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # kept alive by the client
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
