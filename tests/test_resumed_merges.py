"""A merge that was interrupted goes on where it was: byte for byte the same, and no finished file is written twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import progress_tools
import pytest
from click.testing import CliRunner
from conftest import QV, edit_json, interruptible, make_adapter, make_base
from progress_tools import in_the_middle
from quantized_int4 import folder_of, gptq, with_settings
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, Progress, cli, merge, plan_merge
from fossil_export.errors import MergeError
from fossil_export.merging import _digest as digest_module
from fossil_export.merging import plan_digest
from fossil_export.merging._run import Writer
from fossil_export.writing import _assembly as assembly_module
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal
from fossil_export.writing._output import OutputFile


class Stop(BaseException):
    """An interruption."""


every_slab = progress_tools.every_slab


@pytest.fixture
def own(parts: Path, tmp_path: Path) -> Path:
    """A base in seven files and an adapter of its q_proj and v_proj, to be changed."""
    for name in ("base", "qv", "k"):
        shutil.copytree(parts / name, tmp_path / name)
        if name != "base":
            edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in three files."""
    folder = tmp_path_factory.mktemp("small")
    make_base(folder / "base", shards="100KB")
    make_adapter(folder / "qv", folder / "base", target_modules=QV)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob(".merged.partial-*"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are written, each time."""
    names: list[str] = []
    write = Writer.write

    def counted(self: Writer, file: Any, *given: Any, **options: Any) -> Any:
        result = write(self, file, *given, **options)
        names.append(file.name)
        return result

    monkeypatch.setattr(Writer, "write", counted)
    return names


def interrupt(folder: Path, files: int = 3, **options: Any) -> None:
    """Merge, and stop after so many files."""
    with pytest.MonkeyPatch.context() as patch:
        note, left = Journal.add, [files]

        def add(self: Journal, *given: Any) -> None:
            note(self, *given)
            left[0] -= 1
            if not left[0]:
                raise Stop

        patch.setattr(Journal, "add", add)
        with pytest.raises(Stop):
            merge(folder / "qv", folder / "merged", **options)
    assert len(kept(folder)) == 1 and not (folder / "merged").exists()


def killed(folder: Path, at: int) -> bool:
    """A merge in a process of its own that kills itself when it has the disk for the `at`-th time: before a piece is
    written, before a file or a note has its name, before the folder is published. False if it is done before."""
    child = os.fork()
    if child == 0:
        try:
            turn = count(1)  # one after the other, whatever thread comes

            def counted(do: Callable[..., Any]) -> Callable[..., Any]:
                def step(*given: Any, **options: Any) -> Any:
                    if next(turn) == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return do(*given, **options)

                return step

            OutputFile.write = counted(OutputFile.write)  # type: ignore[method-assign]
            OutputFile.close = counted(OutputFile.close)  # type: ignore[method-assign]
            Path.replace = counted(Path.replace)  # type: ignore[method-assign]
            Path.rename = counted(Path.rename)  # type: ignore[method-assign]
            staging.sync_tree = counted(staging.sync_tree)
            staging.publish = counted(staging.publish)
            merge(folder / "qv", folder / "merged")
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_anywhere_it_goes_on_and_makes_the_same_bytes(small: Path, written: list[str]) -> None:
    """Before every piece of every file that is written, and every step between."""
    merge(small / "qv", small / "whole")
    wanted, files = content(small / "whole"), len(written)
    finished = []
    at = 1
    while killed(small, at):
        if not (small / "merged").exists():
            noted = {name for folder in kept(small) for name in Journal(folder).notes()}
            written.clear()
            result = merge(small / "qv", small / "merged")
            assert not {*written} & noted and len(written) == files - len(noted) and result.resumed == len(noted)
            finished.append(len(noted))
            assert kept(small) == []
        assert content(small / "merged") == wanted
        shutil.rmtree(small / "merged")
        at += 1
    assert at > 20 and {*finished} == {*range(files + 1)} and finished == sorted(finished)


def test_killed_again_and_again_it_gets_there(own: Path) -> None:
    merge(own / "qv", own / "whole")
    times = 0
    while killed(own, 14):
        times += 1
    assert times > 3 and content(own / "merged") == content(own / "whole") and kept(own) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_keeps_what_is_finished_and_says_nothing_of_it(number: int, own: Path) -> None:
    command = ["merge", str(own / "qv"), "-o", str(own / "merged")]
    slow = "import sys, time; from fossil_export.writing import _journal as j; add = j.Journal.add\n"
    slow += "def slowly(*given): add(*given); sys.stdout.write('noted\\n'); sys.stdout.flush(); time.sleep(30)\n"
    slow += "j.Journal.add = slowly; from fossil_export import _start; sys.argv[0] = 'fossil-export'; _start.main()"
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout is not None and process.stdout.readline() == "noted\n"
    process.send_signal(number)
    _, words = process.communicate(timeout=25)
    assert (process.returncode, words) == (128 + number, "Aborted!\n" if number == signal.SIGINT else "")
    assert len(kept(own)) == 1
    result = CliRunner().invoke(cli.main, [*command, "--json"])
    assert json.loads(result.stdout)["resumed"] == 1
    assert "taken up where an earlier run was interrupted; 1 file is of that, of 7" in result.stderr
    assert kept(own) == []


@pytest.mark.usefixtures("every_slab")
def test_without_a_finished_file_nothing_is_kept(own: Path) -> None:
    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        merge(own / "qv", own / "new" / "merged", progress=in_the_middle(stop))
    assert not (own / "new").exists()


def test_an_error_removes_what_is_finished(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, left = Journal.add, [3]

    def fail(self: Journal, *given: Any) -> None:
        add(self, *given)
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", fail)
    with pytest.raises(FossilExportError, match="No space left on device; make room"):
        merge(own / "qv", own / "merged")
    assert kept(own) == []


CHANGES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "base": ("another base", lambda own: _touch(next((own / "base").glob("*.safetensors")))),
    "a file beside it": ("another base", lambda own: _touch(own / "base" / "tokenizer.json")),
    "adapter": ("another adapter", lambda own: _overwrite(own / "qv", own / "k")),
    "weight": ("another adapter", lambda own: {"weights": [0.5]}),
    "dtype": (r"another options \(--dtype auto.* now --dtype bfloat16", lambda own: {"dtype": "bfloat16"}),
    "size of files": ("another options", lambda own: {"max_shard_size": "40KB"}),
}


def _touch(path: Path) -> dict[str, Any]:
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    return {}


def _overwrite(old: Path, new: Path) -> dict[str, Any]:
    shutil.copy(new / "adapter_model.safetensors", old)
    shutil.copy(new / "adapter_config.json", old)
    return {}


@pytest.mark.parametrize("change", CHANGES)
def test_with_other_inputs_it_begins_anew_and_says_what_differs(change: str, own: Path, written: list[str]) -> None:
    interrupt(own)
    told, make = CHANGES[change]
    options = make(own)
    written.clear()
    result = merge(own / "qv", own / "merged", **options)
    assert len(written) == len(result.plan.files) and result.resumed == 0 and kept(own) == []
    (line,) = [one for one in result.warnings if "begun anew" in one]
    assert str(own / "merged") in line
    assert re.search(told, line), line
    merge(own / "qv", own / "whole", **options)
    assert content(own / "merged") == content(own / "whole")


def test_of_another_version_it_begins_anew(own: Path, written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(own)
    monkeypatch.setattr(digest_module, "__version__", "9.9")
    written.clear()
    result = merge(own / "qv", own / "merged")
    assert len(written) == 7 and any("another version" in line and "9.9" in line for line in result.warnings)


def test_a_finished_file_that_was_changed_is_merged_again(own: Path, written: list[str]) -> None:
    merge(own / "qv", own / "whole")
    interrupt(own)
    (folder,) = kept(own)
    result = folder / "result"
    names = sorted(Journal(folder).notes())
    tampered = result / names[0]
    content_of = bytearray(tampered.read_bytes())
    content_of[-1] ^= 1
    tampered.write_bytes(content_of)
    _touch(result / names[1])  # its time is another, its bytes are the same: it counts
    copy = (result / names[2]).read_bytes()
    (result / names[2]).unlink()
    (result / names[2]).write_bytes(copy)
    written.clear()
    assert merge(own / "qv", own / "merged").resumed == 2
    assert names[0] in written and not {*names[1:]} & {*written}
    assert content(own / "merged") == content(own / "whole")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"file": 1}', b"\xff\xfe", None])
def test_a_note_that_is_damaged_counts_for_nothing(damage: bytes | None, own: Path, written: list[str]) -> None:
    merge(own / "qv", own / "whole")
    interrupt(own)
    (folder,) = kept(own)
    for note in (folder / "notes").iterdir():
        if damage is None:
            edit_json(note, about={"name": "x"})
        else:
            note.write_bytes(damage)
    written.clear()
    assert merge(own / "qv", own / "merged").resumed == 0 and len(written) == 7
    assert content(own / "merged") == content(own / "whole") and kept(own) == []


def test_what_else_lies_in_the_kept_folder_is_not_published(own: Path) -> None:
    interrupt(own)
    (folder,) = kept(own)
    (folder / "result" / "stray.safetensors").write_bytes(b"half")
    merge(own / "qv", own / "merged")
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole")


def test_another_output_has_its_own(own: Path, written: list[str]) -> None:
    interrupt(own)
    written.clear()
    assert merge(own / "qv", own / "other").resumed == 0 and len(written) == 7
    assert merge(own / "qv", own / "merged").resumed == 3


def test_hashes_of_files_that_were_finished_before_are_recorded(own: Path) -> None:
    interrupt(own)
    merge(own / "qv", own / "merged", hash=True)
    merge(own / "qv", own / "whole", hash=True)
    assert content(own / "merged") == content(own / "whole")
    shutil.rmtree(own / "merged")
    interrupt(own, hash=True)
    merge(own / "qv", own / "merged")
    merge(own / "qv", own / "plain")
    assert content(own / "merged") == content(own / "plain")


def test_an_old_folder_stays_until_it_is_replaced(own: Path) -> None:
    merge(own / "k", own / "merged")
    old = content(own / "merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly_module.FolderAssembly, "publish", lambda self: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            merge(own / "qv", own / "merged", overwrite=True)
    assert content(own / "merged") == old and len(kept(own)) == 1
    assert merge(own / "qv", own / "merged", overwrite=True).resumed == 7
    assert content(own / "merged") != old and kept(own) == []


def test_progress_begins_where_it_was(own: Path) -> None:
    interrupt(own)
    told: list[Progress] = []
    result = merge(own / "qv", own / "merged", progress=told.append)
    steps = [one for one in told if one.step == "merging"]
    headers = sum(len(file.header) for file in result.plan.files)
    assert steps[1].done > 0 and steps[-1].done == steps[-1].total == result.plan.nbytes - headers


def test_the_digest_tells_adapters_apart_that_differ_in_one_byte(own: Path) -> None:
    before = plan_digest(plan_merge(own / "qv"))
    path = own / "qv" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = plan_digest(plan_merge(own / "qv"))
    assert before.digest != after.digest
    assert [name for name in before.about if before.about[name] != after.about[name]] == ["adapter"]


def test_what_another_user_has_put_there_is_not_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(own, 3)
    (planted,) = kept(own)
    read: list[Path] = []
    find, about = Path.stat, Journal.about

    def stat(self: Path, **options: Any) -> os.stat_result:
        found = find(self, **options)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]]) if self == planted else found

    def noted(self: Journal) -> Any:
        read.append(self.path)
        return about(self)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Journal, "about", noted)
    result = merge(own / "qv", own / "merged")
    assert result.resumed == 0 and result.warnings == () and planted not in read


def test_another_base_of_the_same_size_and_time_begins_anew(own: Path) -> None:
    """Copied with its time, or out of an image whose files have all one time."""
    interrupt(own, 3)
    for path in (own / "base").glob("*.safetensors"):
        status, tensors = path.stat(), load_file(path)
        save_file({name: value + 1 for name, value in tensors.items()}, path, {"format": "pt"})
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
    result = merge(own / "qv", own / "merged")
    assert result.resumed == 0 and any("another base" in line for line in result.warnings)
    merge(own / "qv", own / "whole")
    assert content(own / "merged") == content(own / "whole")


def test_settings_that_say_how_weights_are_read_are_of_the_digest(tmp_path: Path) -> None:
    """GPTQModel keeps them in a file that no merged model has."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
    found = folder_of(tmp_path, lambda shape, name: gptq(shape, less_one=False), settings | {"format": "gptq_v2"})
    base = with_settings(found.quantized, None, settings | {"checkpoint_format": "gptq_v2"})
    make_adapter(tmp_path / "adapter", found.dequantized, target_modules=QV)
    before = plan_digest(plan_merge(tmp_path / "adapter", base))
    with_file = base / "quantize_config.json"
    with_file.write_text(json.dumps(settings | {"checkpoint_format": "gptq"}))
    after = plan_digest(plan_merge(tmp_path / "adapter", base))
    assert [name for name in before.about if before.about[name] != after.about[name]] == ["base"]


def test_too_little_room_for_the_rest_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(own, 5)
    plan = plan_merge(own / "qv")
    free = plan.nbytes + (1 << 20) - 1000  # for all of it that would be too little
    usage = shutil.disk_usage(own)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert merge(own / "qv", own / "merged").resumed == 5
    with pytest.raises((FossilExportError, MergeError), match="make room"):
        merge(own / "qv", own / "other")
