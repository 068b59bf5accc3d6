"""The loopback Hub misbehaves as told, and the real client takes it as it does the real Hub's trouble."""

from __future__ import annotations

from pathlib import Path

import loopback_tools
import pytest
from hub_tools import HTTPX
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from loopback import Fault, LoopbackHub
from loopback_tools import WEIGHTS, add, read_range

hub = loopback_tools.hub
api = loopback_tools.api
source = loopback_tools.source


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_retried(hub: LoopbackHub, api: HfApi, source: str, status: int) -> None:
    fault = Fault("GET", "/resolve/", status=status, headers={"Retry-After": "0"}, times=2)
    hub.fault(fault)
    assert read_range(source, "model.safetensors", 0, 9) == WEIGHTS[:10]
    assert fault.times == 0
    hub.fault(Fault("PUT", "/storage/", status=status, times=2))
    hub.create("ada/new")
    add(api, "ada/new", {"model.safetensors": WEIGHTS})
    assert hub.read("ada/new", "model.safetensors") == WEIGHTS


def test_a_cut_download_is_resumed(hub: LoopbackHub, api: HfApi, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client resumes at a multiple of this, which is 10 MB: a smaller file starts again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500_000)
    hub.fault(Fault("GET", "/cdn/", cut_after=1_000_000))
    assert Path(api.hf_hub_download(source, "model.safetensors")).read_bytes() == WEIGHTS
    assert hub.moved()[0] < len(WEIGHTS) + 10_000


def test_a_reset_download_is_not(hub: LoopbackHub, api: HfApi, source: str, tmp_path: Path) -> None:
    hub.fault(Fault("GET", "/cdn/", cut_after=1_000_000, reset=True))
    with pytest.raises(HTTPX.ReadError):
        api.hf_hub_download(source, "model.safetensors")
    assert not list((tmp_path / "home").rglob("*.incomplete"))


@pytest.mark.parametrize("cut", [0, 1_000_000])
def test_a_cut_upload_is_retried(hub: LoopbackHub, api: HfApi, cut: int) -> None:
    hub.create("ada/new")
    hub.fault(Fault("PUT", "/storage/", cut_after=cut))
    add(api, "ada/new", {"model.safetensors": WEIGHTS})
    assert hub.read("ada/new", "model.safetensors") == WEIGHTS


def test_a_corrupt_upload_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("ada/new")
    hub.fault(Fault("PUT", "/storage/", corrupt=True))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'") as raised:
        add(api, "ada/new", {"model.safetensors": WEIGHTS})
    assert isinstance(raised.value.__cause__, hub_errors.HfHubHTTPError)
    assert raised.value.__cause__.response.status_code == 422
    assert set(hub.files("ada/new")) == {".gitattributes"}
    add(api, "ada/new", {"model.safetensors": WEIGHTS})
    assert hub.read("ada/new", "model.safetensors") == WEIGHTS


def test_a_corrupt_download_passes_the_client(hub: LoopbackHub, api: HfApi, source: str) -> None:
    hub.fault(Fault("GET", "/cdn/", corrupt=True, trickle=(1 << 20, 0.001)))
    got = Path(api.hf_hub_download(source, "model.safetensors")).read_bytes()
    assert len(got) == len(WEIGHTS) and sum(a != b for a, b in zip(got, WEIGHTS, strict=True)) == 1


def test_a_lost_commit_has_happened(hub: LoopbackHub, api: HfApi) -> None:
    hub.create("ada/new")
    happened: list[str] = []
    hub.fault(Fault("POST", "/commit/", after=lambda: happened.append(hub.head("ada/new")), lost=True))
    with pytest.raises(HTTPX.RemoteProtocolError):
        add(api, "ada/new", {"a.txt": b"a"})
    assert hub.read("ada/new", "a.txt") == b"a" and happened == [hub.head("ada/new")]
    hub.fault(Fault("POST", "/commit/", status=500))
    with pytest.raises(hub_errors.HfHubHTTPError):
        add(api, "ada/new", {"b.txt": b"b"})
    hub.fault(Fault("POST", "/commit/", cut_after=10))
    with pytest.raises(HTTPX.TransportError):
        add(api, "ada/new", {"b.txt": b"b"})
    hub.fault(Fault(status=500, times=None, skip=1))
    assert api.whoami()["name"] == "ada"
    with pytest.raises(hub_errors.HfHubHTTPError):
        api.whoami()
    hub.clear_faults()
    assert "b.txt" not in hub.files("ada/new")
