"""Several adapters, each at its weight, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_base
from hub_tools import cli, content, record
from loopback import LoopbackHub
from peft import LoraConfig
from several_tools import trained

from fossil_export import merge, merge_to_hub, push


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A LoRA, a MISS adapter, and one whose name looks like a weight."""
    base = make_base(tmp_path / "base")
    return [
        trained(tmp_path / "lora", base, 1, kind=LoraConfig, target_modules=["q_proj", "up_proj"]),
        trained(tmp_path / "miss", base, 2, target_modules=["q_proj"]),
        trained(tmp_path / "rate=0.5", base, 3, target_modules=["q_proj"]),
    ]


def test_the_command_is_the_call(three: list[Path], tmp_path: Path) -> None:
    lora, miss, rate = three
    options = ["--adapter", miss, "--adapter", f"{rate}=-2"]
    done = cli("merge", f"{lora}=0.7", *options, "--output", tmp_path / "typed")
    merge([(lora, 0.7), miss, (rate, -2.0)], tmp_path / "called")
    assert content(tmp_path / "typed") == content(tmp_path / "called")
    names = [Path(entry["name"]).name for entry in record(tmp_path / "typed")["adapters"]]
    assert names == ["lora", "miss", "rate=0.5"]
    assert "lora, r=8, at weight 0.7 + tile, r=8, at weight 1 + tile, r=8, at weight -2" in done.stdout
    cli("merge", rate, "--output", tmp_path / "one")  # a path that is there is a path
    assert "weight" not in record(tmp_path / "one")["adapter"]
    cli("verify", tmp_path / "typed", "--level", "weights")


def test_the_plan_names_each_with_its_weight(three: list[Path]) -> None:
    done = cli("merge", f"{three[0]}=0.7", "--adapter", three[1], "--dry-run")
    assert "0.7 × lora r=8 + tile r=8" in done.stdout
    assert (
        f"adapter  {three[0]} (lora, r=8, at weight 0.7)\nadapter  {three[1]} (tile, r=8, at weight 1)" in done.stdout
    )
    plan = json.loads(cli("merge", three[0], "--adapter", f"{three[1]}=0", "--dry-run", "--json").stdout)
    assert [entry["weight"] for entry in plan["adapters"]] == [1.0, 0.0]


@pytest.mark.parametrize("given", ["lora=much", "lora=", "=0.5", "lora=nan", "lora=inf", "no/such=3/adapter"])
def test_a_weight_that_is_no_number_is_a_wrong_use(given: str, three: list[Path], tmp_path: Path) -> None:
    for options in ([f"{tmp_path}/{given}" if given[0] != "=" else given], [three[0], "--adapter", given]):
        done = cli("merge", *options, "--output", tmp_path / "out", code=2)
        assert "is neither a path that is there nor ADAPTER=WEIGHT with a number for the weight" in done.stderr
    done = cli("verify", tmp_path / "out", "--adapter", given, code=2)
    assert "nor ADAPTER=WEIGHT" in done.stderr and not (tmp_path / "out").exists()


def test_verify_takes_the_adapters_from_elsewhere(three: list[Path], tmp_path: Path) -> None:
    lora, miss, _ = three
    cli("merge", f"{lora}=0.7", "--adapter", miss, "--output", tmp_path / "merged")
    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in (lora, miss)]
    cli("verify", tmp_path / "merged", "--level", "weights", code=1)
    named = ["--adapter", moved[0], "--adapter", moved[1]]
    done = cli("verify", tmp_path / "merged", "--level", "weights", *named)
    assert "the 2 adapters together, at weights 0.7, 1, on the base as it is stored" in done.stdout
    wrong = ["--adapter", f"{moved[0]}=0.6", "--adapter", moved[1]]
    assert "not the trained model" in cli("verify", tmp_path / "merged", "--level", "weights", *wrong, code=1).stderr
    swapped = ["--adapter", moved[1], "--adapter", moved[0]]
    done = cli("verify", tmp_path / "merged", "--level", "weights", *swapped, code=1)
    assert "was made from another adapter than" in done.stderr


def test_help_says_whose_the_rest_is() -> None:
    text = " ".join(cli("merge", "--help").stdout.split())
    assert "TIES, DARE, SLERP" in text and "mergekit" in text and "--adapter ADAPTER[=WEIGHT]" in text


def test_streamed_it_is_what_is_merged_and_pushed(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    second = "hf://ada/adapter/checkpoint-100"
    cache = ["--cache-dir", tmp_path / "cache"]
    options = ["--adapter", f"{second}=0.5", "--push-to-hub", "ada/streamed", "--stream"]
    planned = cli("merge", "ada/adapter", *options, "--dry-run").stdout
    assert "at weight 1)" in planned and "at weight 0.5)" in planned
    cli("merge", "ada/adapter", *options, *cache)
    push(merge(["ada/adapter", (second, 0.5)], tmp_path / "merged").output, "ada/pushed")
    names = hosted.files("ada/streamed")
    assert names.keys() == hosted.files("ada/pushed").keys() and "fossil_export.json" in names
    for name in set(names) - {"README.md"}:
        assert hosted.read("ada/streamed", name) == hosted.read("ada/pushed", name), name
    card = hosted.read("ada/streamed", "README.md").decode()
    assert "the sum of 2 adapters" in card and "at weight 1)" in card and "at weight 0.5)" in card
    again = merge_to_hub(["ada/adapter", (second, 0.25)], "ada/streamed", cache_dir=tmp_path / "cache")
    assert again.push.changed  # at another weight it is another merge
    cli("verify", "ada/streamed", "--level", "weights")
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.*")) == []


def test_the_card_quotes_the_verdict_on_several(hosted: LoopbackHub, models: Path, tmp_path: Path) -> None:
    private = trained(tmp_path / "private", models / "base", 3)
    merge(["ada/adapter", (private, 0.5)], tmp_path / "merged", base="ada/base")
    cli("verify", tmp_path / "merged", "--level", "weights")
    push(tmp_path / "merged", "ada/new")
    card = hosted.read("ada/new", "README.md").decode()
    assert "| Verdict | parity |" in card and "the adapters, at their weights, on the base" in card
    for name in hosted.files("ada/new"):
        assert str(tmp_path).encode() not in hosted.read("ada/new", name), name
