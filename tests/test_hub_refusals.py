"""What the Hub refuses: one line with the remedy, no traceback, no token."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ADA
from hub_tools import OFFLINE, PART, QUICK, cli, nobody_there, offline
from huggingface_hub import constants
from loopback import Fault, Handler, LoopbackHub, environment

Setup = Callable[[LoopbackHub, pytest.MonkeyPatch, Path], Any]
HERE = "no such file or folder here, and "
LOGIN = "no such model on the Hub, or it is private; check the name, or log in with `hf auth login`"
TROUBLE = "the Hub has trouble of its own (status 500); run the same command again later"
FEWER = "the Hub asks for fewer requests; wait a few minutes and run the same command again"


def private(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    hub.create("bob/secret", private=True)


def gated(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    hub.create("bob/gated", gated=True)
    hub.commit("bob/gated", {path.name: path for path in (models / "base").iterdir() if path.is_file()})
    hub.commit("bob/gated", {path.name: path for path in (models / "adapter").iterdir() if path.is_file()})


def anonymous(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    private(hub, patch, models)
    gated(hub, patch, models)
    patch.delenv("HF_TOKEN")


def bad_token(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    patch.setenv("HF_TOKEN", "hf_wrongwrong")


def always(status: int, path: str) -> Setup:
    return lambda hub, patch, models: hub.fault(Fault(path=path, status=status, times=None))


def changed(files: dict[str, bytes], *delete: str) -> Setup:
    return lambda hub, patch, models: hub.commit("ada/base", files, delete=delete)


def portal(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    """A network that answers everything itself."""
    real = Handler.send

    def send(self: Any, reply: Any) -> None:
        reply.body = b"<html>Please log in"
        real(self, reply)

    patch.setattr(Handler, "send", send)


def full(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    patch.setattr("fossil_export.storage.hub._remote.shutil.disk_usage", lambda place: SimpleNamespace(free=10))


def unusable(hub: LoopbackHub, patch: pytest.MonkeyPatch, models: Path) -> None:
    Path(constants.HF_HOME).mkdir()
    Path(constants.HF_HUB_CACHE).write_text("a file")


def nothing(*_: Any) -> None:
    pass


WEIGHTS_ONLY_BIN = changed(
    {}, *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"
)
REFUSALS: list[tuple[Setup, list[str], str]] = [
    (anonymous, ["bob/secret"], f"bob/secret: {HERE}{LOGIN}"),
    (anonymous, ["hf://bob/secret"], f"bob/secret: {LOGIN}"),
    (private, ["bob/secret"], f"bob/secret: {HERE}{LOGIN}"),
    (private, ["ada/adapter", "--base", "bob/secret"],
     f"bob/secret: {HERE}{LOGIN}, or name another base with --base"),
    (bad_token, ["ada/adapter"],
     "ada/adapter: the Hub does not know this token; log in again with `hf auth login`, or set HF_TOKEN"),
    (gated, ["bob/gated"], "bob/gated: is gated; accept the licence at HUB/bob/gated and log in with `hf auth login`"),
    (anonymous, ["ada/adapter", "--base", "bob/gated"],
     "bob/gated: is gated; accept the licence at HUB/bob/gated and log in with `hf auth login`"),
    (nothing, ["ada/none"], f"ada/none: {HERE}{LOGIN}"),
    (nothing, ["a--b/c"],
     f"a--b/c: {HERE}it is no name of a model on the Hub (Cannot have -- or .. in repo_id: 'a--b/c'); write user/repo"),
    (nothing, ["ada/adapter@none"],
     "ada/adapter: has no such revision; see HUB/ada/adapter/tree/main for its branches and tags"),
    (nothing, ["ada/adapter@" + "0" * 40],
     "ada/adapter: has no such revision; see HUB/ada/adapter/tree/main for its branches and tags"),
    (nothing, ["hf://ada/adapter/checkpoint-200"],
     "ada/adapter: has no checkpoint-200 at COMMIT; see its files at HUB/ada/adapter/tree/main"),
    (nothing, ["hf://ada/adapter", "--base", "hf://ada/base/none.safetensors"],
     "ada/base: has no none.safetensors at COMMIT; see its files at HUB/ada/base/tree/main"),
    (nothing, ["ada/base"],
     "ada/base: not an adapter, adapter_config.json is missing; it looks like a model, and the adapter is the folder "
     "that PEFT saved"),
    (nothing, ["hf://datasets/ada/adapter"],
     "hf://datasets/ada/adapter: is a dataset, not a model; write hf://user/repo[@revision][/folder]"),
    (nothing, ["hf://adapter"],
     "hf://adapter: is no address of a model (Repository id must be 'namespace/name', got 'adapter'); write "
     "hf://user/repo[@revision][/folder]"),
    (nothing, ["https://example.com/ada/adapter?token=hf_secretsecret"],
     "https://example.com/ada/adapter?…: is no address of a model (Unrecognized host 'example.com'. Expected a Hugging "
     "Face URL (e.g. 'https://huggingface.co/...')); write hf://user/repo[@revision][/folder]"),
    (always(429, "^/api/models/ada/adapter$"), ["ada/adapter"], f"ada/adapter: {FEWER}"),
    (always(429, "/resolve/.*config"), ["ada/adapter"], f"ada/adapter: {FEWER}"),
    (always(500, "^/api/models/ada/adapter$"), ["ada/adapter"], f"ada/adapter: {TROUBLE}"),
    (always(500, "/tree/"), ["ada/adapter"], f"ada/adapter: {TROUBLE}"),
    (always(500, "ada/base/resolve/"), ["ada/adapter"], f"ada/base: {TROUBLE}"),
    (always(500, "/cdn/"), ["ada/adapter"], f"ada/adapter: {TROUBLE}"),
    (nobody_there, ["ada/adapter"],
     f"ada/adapter: {HERE}HUB cannot be reached ([Errno 111] Connection refused); check the network, HTTPS_PROXY and "
     "HF_ENDPOINT, and run the same command again"),
    (portal, ["ada/adapter"], "ada/adapter: HUB answers, but not as the Hub does; check HTTPS_PROXY and HF_ENDPOINT"),
    (offline, ["ada/adapter"], f"ada/adapter: {HERE}it {OFFLINE}"),
    (WEIGHTS_ONLY_BIN, ["ada/adapter"],
     "ada/base/pytorch_model.bin: is no file of PyTorch's; fetch it again, or name the weights"),
    (changed({}, PART), ["ada/adapter"],
     f"ada/base/model.safetensors.index.json: names {PART}, which is missing; fetch that file"),
    (changed({"config.json": b"<html>"}), ["ada/adapter"],
     "ada/base/config.json: is not valid JSON (Expecting value: line 1 column 1 (char 0)); fetch or save it again"),
    (changed({PART: b""}), ["ada/adapter"],
     f"ada/base/{PART}: 0 bytes are too few for a safetensors file; the file is cut or corrupt, fetch or save it "
     "again"),
    (full, ["ada/adapter"],
     "ada/adapter: fetching it takes 547 bytes, CACHE has 10 free; make room, or move the cache with HF_HOME"),
    (unusable, ["ada/adapter"],
     "ada/adapter: CACHE/models--ada--adapter: Not a directory; see to the Hub's cache, or move it with HF_HOME"),
]  # fmt: skip


@pytest.mark.parametrize(
    "setup, arguments, message", REFUSALS, ids=[f"{n}-{row[1][-1]}" for n, row in enumerate(REFUSALS)]
)
def test_a_refusal_is_one_line_with_the_remedy(
    hosted: LoopbackHub,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setup: Setup,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    setup(hosted, monkeypatch, models)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    result = cli("merge", *arguments, "-o", tmp_path / "merged", code=1)
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    told = re.sub("[0-9a-f]{12}(?=;)", "COMMIT", result.stderr)
    told = told.replace(hosted.endpoint, "HUB").replace(constants.HF_HUB_CACHE, "CACHE")
    assert told.startswith(f"error: {message}") and told.endswith(f"{message}\n") and told.count("\n") == 1
    for token in (ADA, "hf_wrongwrong", "hf_secretsecret"):
        assert token not in result.stderr + caplog.text
    assert not (tmp_path / "merged").exists()


def test_inspect_goes_without_a_base_that_is_not_to_be_had(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    hosted.fault(Fault(path="ada/base/resolve/", status=403, times=None))
    result = cli("inspect", "ada/adapter", "--json")
    assert json.loads(result.stdout)["base_tensors"] is None
    assert re.fullmatch(
        r"warning: the base was not looked at: ada/base: your token may not do that;.*\n", result.stderr
    )
    result = cli("inspect", "ada/adapter", "--base", "ada/base", "--json", code=1)
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem.startswith("ada/base: your token may not do that;")


@pytest.mark.parametrize("debug", [False, True])
def test_a_pipe_gets_one_line(hosted: LoopbackHub, tmp_path: Path, debug: bool) -> None:
    hosted.create("ada/secret", private=True)
    hosted.fault(Fault(path="/cdn/", status=500, times=None))
    env = environment(hosted, tmp_path / "h", ADA) | ({"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"} if debug else {})
    command = [sys.executable, "-c", QUICK, "merge", "ada/adapter", "-o", str(tmp_path / "merged")]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    last = ran.stderr.splitlines()[-1]
    assert last == f"error: ada/adapter: {TROUBLE}"
    assert (ran.stderr == f"{last}\n") is not debug
    assert ADA not in ran.stderr and any(seen.has_token for seen in hosted.log)
    assert not re.search(r"signature=[0-9a-f]", ran.stderr)


def test_a_traceback_holds_no_signed_address(hosted: LoopbackHub, tmp_path: Path) -> None:
    hosted.fault(Fault("GET", "/cdn/", status=403, times=None))
    told = cli("--debug", "merge", "ada/adapter", "-o", tmp_path / "merged", code=1).stderr
    assert told.startswith("Traceback") and "/cdn/" in told and "signature=" not in told and ADA not in told


def test_settings_that_the_client_refuses(hosted: LoopbackHub, tmp_path: Path) -> None:
    for name, value in {"HF_ENDPOINT": "http://[::", "HF_HUB_DOWNLOAD_TIMEOUT": "soon"}.items():
        for command in (["merge", "ada/adapter", "-o", "merged"], ["push", ".", "ada/new"]):
            ran = subprocess.run(
                [sys.executable, "-m", "fossil_export", *command, "--json"],
                env=environment(hosted, tmp_path / "home", ADA) | {name: value},
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
            assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
            assert ran.stderr.startswith("error: the Hub's client refuses its settings (")
            assert ran.stderr.endswith("); check the variables that begin with HF_\n")


def test_every_command_refuses_alike(hosted: LoopbackHub, tmp_path: Path) -> None:
    for what, command in {
        "adapter": ["inspect", "ada/none"],
        "adapter, converted": ["convert", "ada/none", "--to", "lora", "-o", str(tmp_path / "lora")],
        "artifact": ["verify", "ada/none"],
    }.items():
        told = cli(*command, code=1)
        assert told.stderr == f"error: ada/none: {HERE}{LOGIN}\n", what
        assert told.stdout == ""
    command = ["convert", "ada/adapter", "--base", "ada/none", "--to", "lora", "-o", str(tmp_path / "lora")]
    assert cli(*command, code=1).stderr.startswith(f"error: ada/none: {HERE}{LOGIN}, or name another base with --base")
    assert {path.name for path in tmp_path.iterdir()} == {"storage", "home"}
