"""The command `push`, and `merge --push-to-hub`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ADA
from hub_tools import cli, content
from loopback import Fault, LoopbackHub, environment
from push_tools import JUNK, graph, litter, made, published

from fossil_export import FossilExportError, push


def test_whoever_reads_the_output_may_leave(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """It is published all the same, and nothing is said against a path."""
    folder = made("miss", hosted, models, tmp_path / "miss")
    reads, writes = os.pipe()
    os.close(reads)
    ran = subprocess.run(
        [sys.executable, "-m", "fossil_export", "push", folder, "ada/new", "--json"],
        env=environment(hosted, tmp_path / "home of child", ADA),
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert "error" not in ran.stderr and "adapter_model.safetensors" in hosted.files("ada/new")


def test_the_command(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    litter(folder)
    done = cli("push", folder, "ada/new", "--private", "--revision", "v1", "--commit-message", "Mine", "--json")
    found = json.loads(done.stdout)
    assert found["revision"] == "v1" and found["commit"] == hosted.head("ada/new", "v1")
    assert hosted.readable("ada", "ada/new").private and hosted.commits("ada/new", "v1")[0] == "Mine"
    assert set(found["left_behind"]) == JUNK and found["bytes"] > 200_000
    table = cli("push", folder, "ada/new", "--create-pr").stdout
    assert f"{hosted.endpoint}/ada/new/discussions/1" in table and "left behind" in table
    assert "holds just this already" in cli("push", folder, "ada/new", "--revision", "v1").stdout


def test_merge_and_push_in_one_command(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    done = cli("merge", "ada/adapter", "-o", tmp_path / "out", "--push-to-hub", "ada/new", "--json")
    found = json.loads(done.stdout)
    assert found["push"]["commit"] == hosted.head("ada/new") and found["tensors_merged"] == 14
    shown = cli("merge", "ada/adapter", "-o", tmp_path / "out2", "--push-to-hub", "ada/new2").stdout
    assert "update kept" in shown and "\n\npublished" in shown
    assert content(tmp_path / "out") == {name: data for name, data in published(hosted).items() if name != "README.md"}
    # What cannot be known before the merge leaves it there.
    hosted.fault(Fault("POST", "/api/repos/create", status=403))
    line = cli(
        "merge", "ada/adapter", "-o", tmp_path / "my out", "--push-to-hub", "ada/new3", "--private", "--commit-message",
        "A first", code=1,
    ).stderr.strip()  # fmt: skip
    command = f"`fossil-export push '{tmp_path}/my out' ada/new3 --private --commit-message 'A first'`"
    assert "\n" not in line and "may not do that" in line and line.endswith(f"go on with {command})")
    assert (tmp_path / "my out" / "config.json").is_file()


def test_a_process_of_its_own(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    folder = made("lora", hosted, models, tmp_path / "artifact")
    command = [sys.executable, "-m", "fossil_export", "push", str(folder), "ada/new", "--json"]
    for token, code in ((ADA, 0), (None, 1), ("hf_wrongwrong", 1)):
        home = tmp_path / f"home-{token}"
        done = subprocess.run(command, env=environment(hosted, home, token), capture_output=True, text=True)
        assert done.returncode == code and "hf_" not in done.stdout + done.stderr
        if code:
            assert done.stdout == "" and done.stderr.startswith("error: ada/new: ") and "hf auth login" in done.stderr
            assert done.stderr.count("\n") == 1
        else:
            assert json.loads(done.stdout)["changed"]
            assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert len(hosted.commits("ada/new")) == 2


def test_without_the_network(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FossilExportError, match="HF_HUB_OFFLINE is set; unset it to publish"):
        push(graph(tmp_path / "artifact"), "ada/new")
