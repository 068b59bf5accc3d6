"""The Hub's client, of this process or of another one, made to use the loopback Hub."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from loopback.hub import LoopbackHub

if TYPE_CHECKING:
    import pytest


def environment(hub: LoopbackHub, home: Path, token: str | None = None) -> dict[str, str]:
    """The whole environment of a child process whose client uses this Hub; it inherits nothing about the real one."""
    mine = {key: value for key, value in os.environ.items() if not re.match(r"HF_|HUGGING|TRANSFORMERS_OFFLINE", key)}
    mine |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    mine |= {"HF_HUB_DISABLE_XET": "1" if hub.xet is None else "0"}
    mine |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    return mine if token is None else mine | {"HF_TOKEN": token}


def point_client_at(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path, token: str | None = None) -> None:
    """Make the client of this process use the Hub, whatever it read from the environment when it was imported."""
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    def put(module: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value, raising=False)

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    put(
        constants,
        ENDPOINT=hub.endpoint,
        HUGGINGFACE_CO_URL_TEMPLATE=template,
        HF_URL_HOSTS=getattr(constants, "HF_URL_HOSTS", frozenset()) | {"127.0.0.1"},
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
    close_session = getattr(_http, "close_session", None) or _http.reset_sessions  # before 1.0
    close_session()
    hub.when_stopped.append(close_session)
    put(_http, time=quick)
    if hasattr(_http, "_HUB_ORIGINS"):  # late clients know their Hub by it
        put(_http, _HUB_ORIGINS=_http._HUB_ORIGINS | {_http._url_origin(hub.endpoint)})
    put(file_download, time=quick, HUGGINGFACE_CO_URL_TEMPLATE=template)  # which it holds by value before 1.0
    put(hf_api.api, endpoint=hub.endpoint)  # behind the module-level functions, made at import
    # Three modules hold settings by value.
    put(import_module("huggingface_hub.utils.tqdm"), HF_HUB_DISABLE_PROGRESS_BARS=True)
    put(import_module("huggingface_hub.utils._cache_manager"), HF_HUB_CACHE=str(home / "hub"))
    put(import_module("huggingface_hub.utils._cache_assets"), HF_ASSETS_CACHE=str(home / "assets"))
    with suppress(ImportError):  # before 1.23
        put(import_module("huggingface_hub._tree_cache"), _IN_MEMORY_TREE_CACHE={})
        agents = import_module("huggingface_hub.utils._detect_agent")
        put(agents, _registry=agents._EMPTY_REGISTRY)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}.items():
        monkeypatch.setenv(name, value)
