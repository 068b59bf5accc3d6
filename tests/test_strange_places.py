"""Names and places that systems allow: what is no file is not waited for, and each refusal says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fossil_export import convert, merge
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.errors import AdapterError, CheckpointError, FossilExportError, OnnxError, OutputError
from fossil_export.onnx.graph._file import load_graph
from fossil_export.storage import expanded, resolve
from fossil_export.writing import _staging as staging
from fossil_export.writing._single_file import staged_file
from fossil_export.writing._staging import check_destination, staged_folder

LONG = ["x" * 255, "é" * 127, "x" * 200, "x" * 201]
STRANGE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link in a circle": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "endless": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", LONG)
def test_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    with staged_folder(tmp_path / name, 0, False) as folder:
        (folder / "x").write_text("x")
    with staged_file(tmp_path / name.replace("x", "y").replace("é", "è")) as path:
        path.write_text("x")
    assert len(list(tmp_path.iterdir())) == 2
    assert all(os.fsencode(path.name)[:1] != b"." for path in tmp_path.iterdir())


def test_leftovers_of_long_names_are_told_apart(tmp_path: Path) -> None:
    first, second = tmp_path / ("x" * 250 + "a"), tmp_path / ("x" * 250 + "b")
    staging.partial_name(first).mkdir()
    assert len(list(staging.leftovers(first))) == 1 and not list(staging.leftovers(second))
    with staged_folder(first, 0, False):
        pass
    assert list(tmp_path.iterdir()) == [first]


def test_name_too_long_is_told_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="File name too long; choose"),
        staged_folder(tmp_path / ("x" * 256), 0, False),
    ):
        pytest.fail("the work began")


def test_new_folder_and_back_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / ".." / "out", 0, False):
        pass
    assert (tmp_path / "out").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), staged_folder(tmp_path / "other" / ".." / "file" / "out", 0, False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "out"]


def test_folder_that_may_not_be_read_takes_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written to, and only not be synced by its name."""

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(staging, "sync", sync)
    with staged_folder(tmp_path / "out", 0, False) as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "out" / "x").is_file()


@pytest.mark.parametrize("where", ["out", "out/below"])
def test_output_in_a_circle_of_links_is_refused(adapter: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OutputError, match="out"):
        convert(adapter, tmp_path / where, to="gguf-lora", base=tmp_path / "base", overwrite=True)
    with pytest.raises(OutputError, match="out"):
        merge(adapter, tmp_path / where, base=tmp_path / "base", overwrite=True)
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("sort", [name for name in STRANGE if name != "folder"])
def test_only_a_file_is_replaced_by_a_file(adapter: Path, tmp_path: Path, sort: str) -> None:
    STRANGE[sort](tmp_path / "out")
    with pytest.raises(OutputError, match=r"out: is (a broken link or no regular file|no file of this format)"):
        convert(adapter, tmp_path / "out", to="gguf-lora", base=tmp_path / "base", overwrite=True)


@pytest.mark.parametrize("sort", STRANGE)
def test_config_that_is_no_file_is_not_passed_over(adapter: Path, tmp_path: Path, sort: str) -> None:
    for folder, name, error in (
        ("base", "config.json", CheckpointError),
        ("adapter", "adapter_config.json", AdapterError),
    ):
        path = tmp_path / folder / name
        aside = path.rename(tmp_path / "aside")
        STRANGE[sort](path)
        with pytest.raises(FossilExportError, match=rf"{name}: is .*; ") as caught:
            merge(adapter, tmp_path / "out", base=tmp_path / "base")
        assert isinstance(caught.value, error) or sort == "endless"
        (path.rmdir if sort == "folder" else path.unlink)()
        aside.rename(path)


def test_folder_without_an_adapter_gets_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is missing; name the folder"):
        merge(tmp_path, tmp_path / "out", base=tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OnnxError, match="pipe: is no regular file; put"):
        load_graph(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="pipe: is neither a file nor a folder; name"):
        resolve(tmp_path / "pipe", AdapterError, "adapter")
    assert expanded(tmp_path / "pipe", AdapterError) == tmp_path / "pipe"


def test_links_out_of_a_folder_are_seen_among_plain_files(tmp_path: Path) -> None:
    (tmp_path / "model" / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "model" / "below" / "link").symlink_to("b")
    folder = LocalFolder(tmp_path / "model")
    assert folder.names() == ["a", "below/b", "below/link"] and folder.root_names() == ["a"]
    (tmp_path / "secret").touch()
    (tmp_path / "model" / "below" / "out").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        folder.names()
    (tmp_path / "model" / "circle").symlink_to("circle")
    assert folder.root_names() == ["a"]


def test_folder_that_holds_an_input_is_no_output_through_links(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(OutputError, match="lies inside"):
        check_destination(tmp_path / "link" / "out", [tmp_path / "base"], False)


def test_current_folder_that_is_gone_is_told(adapter: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [
        sys.executable,
        "-m",
        "fossil_export",
        "merge",
        str(adapter),
        "--base",
        str(tmp_path / "base"),
        "-o",
        "x",
    ]
    script = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=gone, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the current folder is gone; change to one that is there (cd)\n",
    )
