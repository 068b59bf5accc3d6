"""`merge --stream`: the command and its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stream_tools
from hub_tools import cli
from loopback import LoopbackHub
from progress_tools import steps_of
from stream_tools import published

from fossil_export import Progress, StreamResult, merge_to_hub

scene = stream_tools.scene


def test_the_command(scene: LoopbackHub, tmp_path: Path) -> None:
    edit = json.loads(scene.read("ada/qv", "adapter_config.json")) | {"base_model_name_or_path": "ada/many"}
    scene.commit("ada/qv", {"adapter_config.json": json.dumps(edit).encode()})
    command = ["merge", "ada/qv", "--push-to-hub", "ada/new", "--stream", "--cache-dir", tmp_path / "cache"]
    plan = json.loads(cli(*command, "--dry-run", "--json").stdout)["stream"]
    shown = cli(*command, "--dry-run").stdout
    assert "copied on the Hub" in shown and "fetched, merged, sent" in shown and "to fetch" in shown
    assert "ada/new" not in scene.repos() and not (tmp_path / "cache").exists()
    assert not any(seen.method not in ("GET", "HEAD") for seen in scene.log)
    assert plan["bytes_fetched"] == sum(file["bytes"] for file in plan["files"] if file["way"] == "change") > 90_000

    done = cli(*command, "--json", "--private", "--commit-message", "Mine", "--max-disk", "1MB", "--hash")
    found = json.loads(done.stdout)
    assert found["commit"] == scene.head("ada/new") and len(found["copied"]) == 4 and found["resumed"] == 0
    assert scene.commits("ada/new")[0] == "Mine" and scene.readable("ada", "ada/new").private
    assert "run `fossil-export verify ada/new --push-to-hub` and" in done.stderr and "DIR" not in done.stderr
    shown = cli(*command, "--revision", "v1").stdout
    assert (
        "copied on the Hub" in shown
        and "model-00003-of-00007" in shown
        and "update kept" in shown
        and "/ada/new/tree/v1" in shown
    )
    assert published(scene, "ada/new", "v1").keys() == published(scene, "ada/new").keys()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--stream"], "want --push-to-hub"),
        (["-o", "out", "--private"], "want --push-to-hub"),
        (["-o", "out", "--create-pr"], "want --push-to-hub"),
        (["-o", "out", "--push-to-hub", "ada/x", "--max-disk", "1GB"], "want --stream"),
        (["-o", "out", "--cache-dir", "cache"], "want --stream"),
        (["-o", "out", "--push-to-hub", "ada/x", "--stream"], "leave out --output"),
        (["--overwrite", "--push-to-hub", "ada/x", "--stream"], "leave out --output"),
        (["--push-to-hub", "ada/x"], "'--stream' to keep no copy here"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, hub: LoopbackHub) -> None:
    done = cli("merge", "ada/qv", *options, code=2)
    assert said in done.stderr and done.stdout == "" and hub.log == []


def test_results_read_well(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", progress=seen.append)
    steps = [step for step in steps_of(seen) if not step.startswith("fetching ")]
    steps = steps[steps.index("opening ada/new") :]
    assert steps[0] == "opening ada/new" and steps[-1] == "committing"
    assert steps[1] == "[1/7] model-00001-of-00007.safetensors: fetching" and len(steps) == 11
    assert isinstance(result, StreamResult) and result.resumed == 0
    told = json.loads(json.dumps(result.to_dict()))
    assert told["plan"]["stream"]["disk"] == result.plan.disk and told["tensors_merged"] == 4 == len(result.survival)
    assert told["warnings"] == [
        "this was not verified; run `fossil-export verify ada/new --push-to-hub` and the card will quote it"
    ]
