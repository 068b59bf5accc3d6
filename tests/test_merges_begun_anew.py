"""What an interrupted merge left is taken up only by the same merge and only unchanged; else it is told why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resumed_tools
from conftest import QV, edit_json, make_adapter
from hub_tools import content
from quantized_int4 import folder_of, gptq, with_settings
from resumed_tools import interrupt, kept
from safetensors.torch import load_file, save_file

from fossil_export import merge, plan_merge
from fossil_export.merging import _digest as digest_module
from fossil_export.merging import plan_digest
from fossil_export.writing._journal import Journal

own = resumed_tools.own
written = resumed_tools.written

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
