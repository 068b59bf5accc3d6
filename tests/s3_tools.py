"""A local S3 server (moto's) that the tests start and stop, and what they ask it besides what is tested.

`s3_server` and `s3` are in conftest.py. Every request passes `S3Server.hooks`, in the server's thread.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIAFAKEFAKEFAKEFAKE", "fake+secret/that+must/never+be+printed00"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
OTHERS = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
)
FAULTS = {"503 Slow Down": "SlowDown", "403 Forbidden": "AccessDenied", "500 Internal Server Error": "InternalError"}

Answer = tuple[str, dict[str, str], bytes]  # "503 Slow Down", headers, body
Before = Callable[[dict[str, Any]], Answer | None]


class S3Server:
    """moto's S3 on a free port of 127.0.0.1, in threads of this process; use it in a `with`.

    `before` is called with the WSGI environment of each request and may answer in the server's place; `after` is called
    when one was answered, with "METHOD /bucket/key?query" and the status. Both run in the server's threads.
    `requests` has them all.
    """

    def __init__(self) -> None:
        self.before: Before | None = None
        self.after: Callable[[str, int], None] | None = None
        self.requests: list[str] = []

    def __enter__(self) -> S3Server:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            # Connections are kept, as S3's are; the client makes a new one for each request else.
            protocol_version = "HTTP/1.1"

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to use it; those of `OTHERS` must not be set."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    def client(self) -> Any:
        """boto3's client, for what tests do beside what is tested."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=ENVIRONMENT["AWS_DEFAULT_REGION"],
        )

    def bucket(self, name: str) -> str:
        """A new, empty bucket."""
        self._backend.create_bucket(name, ENVIRONMENT["AWS_DEFAULT_REGION"])
        return name

    def add_folder(self, folder: Path, bucket: str, prefix: str) -> None:
        """The files of `folder` as objects prefix/name."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._backend.put_object(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """What is there, by key; asks without a request, so that hooks may use it."""
        return {key: self._backend.get_object(bucket, key).value for key in self.keys(bucket, prefix)}

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        return sorted(key for key in list(self._backend.get_bucket(bucket).keys) if key.startswith(prefix))

    def uploads(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted: somebody pays for them."""
        return sorted(one.key_name for one in list(self._backend.get_bucket(bucket).multiparts.values()))

    def reset(self) -> None:
        """Nothing is there any more, and nobody listens."""
        self.before = self.after = None
        self._backend.reset()
        self.requests.clear()

    @property
    def _backend(self) -> Any:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        what = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}"
        self.requests.append(what)
        said = self.before(environ) if self.before is not None else None
        if said is not None:
            status, headers, body = said
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # the next request follows it
            start_response(status, [*headers.items(), ("Content-Length", str(len(body)))])
            return [body]
        told: list[Any] = []
        content = list(self._app(environ, lambda *status: told.append(status)))
        if self.after is not None:
            self.after(what, int(told[0][0].split()[0]))
        start_response(*told[0])
        return content


def use(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    """This process and those it starts speak to `server`, and to no other."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)


def fault(status: str) -> Answer:
    """One of `FAULTS`, as S3 says it."""
    body = f"<?xml version='1.0'?><Error><Code>{FAULTS[status]}</Code><Message>Told to.</Message></Error>"
    return status, {"Content-Type": "application/xml"}, body.encode()
