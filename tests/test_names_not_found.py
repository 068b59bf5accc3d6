"""Names of what is not here, or is something else: what is here is said first, and what may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from refusal_tools import refused, run

from fossil_export import FossilExportError, convert, load_adapter, merge
from fossil_export.storage._paths import near_to

HERE = "no such file or folder here"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_a_slip_is_told_with_the_name_that_is_there(base: Path, adapter: Path) -> None:
    adapter.rename("my-adapter")
    for typed, meant in (("my-adaptor", "my-adapter"), ("./my-adaptr", "my-adapter"), ("my-adapter/", None)):
        done = run("merge", typed, "-o", "out")
        if meant is None:
            assert done.exit_code == 0, done.output
        else:
            refused(done, f"error: {typed}: {HERE}; did you mean {meant}?")
    absolute = Path("my-adapter").absolute()
    refused(run("inspect", f"{absolute}x"), f"no such file or folder; did you mean {absolute}?")
    refused(run("verify", "my-adaptor"), f"my-adaptor: {HERE}; did you mean my-adapter?")
    refused(run("push", "my-adaptor", "user/x"), "my-adaptor: no such file or folder; did you mean my-adapter?")
    done = run("merge", "my-adapter", "--base", "bas/", "-o", "x")
    refused(done, f"bas/: {HERE}; did you mean base?")
    Path("runs/first/checkpoint-10").mkdir(parents=True)
    assert near_to("rnus/first/checkpoint-10") == "runs/first/checkpoint-10"
    assert near_to("rnus/second") == "runs" and near_to("something else") is None and near_to("my-adapter") is None


def test_here_comes_before_the_hub() -> None:
    refused(run("merge", "zebra", "-o", "x"), f"zebra: {HERE}; name the folder, or a model on the Hub as user/zebra")
    refused(run("inspect", "ada/zebra"), f"error: ada/zebra: {HERE}, and it is not, or not wholly, in the Hub's cache")
    Path("ada/zebras").mkdir(parents=True)
    refused(run("inspect", "ada/zebra"), f"error: ada/zebra: {HERE} (did you mean ada/zebras?), and it is not")
    for path in ("./zebra", "/nowhere/zebra"):
        done = run("inspect", path)
        refused(done, path, "no such file or folder")
        assert "Hub" not in done.stderr


def test_what_is_clearly_an_adapter_gets_no_note_on_the_hub(adapter: Path) -> None:
    Path("ada").mkdir()
    adapter.rename("ada/adapter")
    for typed in ("ada/adapter", "./ada/adapter", Path("ada/adapter").absolute()):
        done = run("merge", typed, "--dry-run")
        assert (done.exit_code, done.stderr) == (0, ""), typed


def test_something_else_in_the_place_of_an_adapter_or_a_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, "merged")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for given, said in (
        ("merged", "merged: not an adapter, adapter_config.json is missing; it is a result of fossil-export, and the"),
        (base, "not an adapter, adapter_config.json is missing; it looks like a model, and the adapter is the folder"),
        ("notes.txt", "notes.txt: is a file that holds no adapter; name the folder that the training saved"),
        ("empty", "empty: not an adapter, adapter_config.json is missing; name the folder that the training saved"),
        ("", "it is empty"),
    ):
        refused(run("merge", given, "-o", "out"), said)
    refused(run("merge", adapter, "--base", adapter, "-o", "out"), "is an adapter, and no base model; name the base")
    refused(run("merge", base, "--base", adapter, "-o", "out"), f"{base}: not an adapter", "it looks like a model")
    assert not (tmp_path / "out").exists()


def test_an_address_with_one_slash_makes_no_folder(adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for typed in ("s3:/bucket/x", "gs:/bucket", "hf:/user/x", "file:/tmp/x"):
        two = typed.replace(":/", "://", 1)
        refused(run("merge", adapter, "-o", typed), f"{typed}: an address has two slashes, '{two}'; for a folder here")
    refused(run("convert", adapter, "--to", "lora", "-o", "s3:/b/x"), "an address has two slashes")
    refused(run("onnx", adapter, "-o", "s3:/b/x"), "an address has two slashes")
    refused(run("inspect", "s3:/bucket/x"), f"s3:/bucket/x: {HERE}; an address has two slashes: s3://bucket/x")
    with pytest.raises(FossilExportError, match="two slashes, 's3://b/x'"):
        merge(adapter, Path("s3://b/x"))  # pathlib makes one of two
    with pytest.raises(FossilExportError, match="is written on this machine only"):
        convert(adapter, "s3://b/x", to="lora")
    assert sorted(tmp_path.iterdir()) == before
    merge(adapter, "./s3:/x")
    assert (tmp_path / "s3:" / "x" / "config.json").is_file() and load_adapter(adapter)


def test_empty_and_crooked_values_are_told_by_their_option(adapter: Path) -> None:
    for arguments, said in (
        (["--ray", ""], "--ray is empty; write auto, local, HOST:PORT or ray://HOST:PORT."),
        (["--trained-on", "nf4", "--llm-int8-skip-modules", "["], "--llm-int8-skip-modules has '[', which is no name"),
        (["--all"], "--all wants --dry-run"),
        (["--part", "1/2", "--finish"], "--finish comes when all parts are there; leave out --part"),
    ):
        done = run("merge", adapter, "-o", "x", *arguments)
        assert done.exit_code == 2 and done.stderr.startswith(f"error: {said}"), done.stderr
    assert not Path("x").exists()


def test_a_link_to_nothing_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("moved").symlink_to("/nowhere/adapter")
    refused(
        run("inspect", "loop"), "error: loop: loop is a link to loop, and nothing is there; name the adapter itself"
    )
    done = run("inspect", "moved/checkpoint-10/x")
    refused(done, "error: moved/checkpoint-10/x: moved is a link to /nowhere/adapter, and nothing is there")
    assert near_to("loop") is None and near_to("moved") is None
