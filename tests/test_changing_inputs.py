"""Files that are replaced, cut or written to while they are read, as a sync does: one line, and nothing is written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import progress_tools
import pytest
import torch
from graphs import make_case, make_graph
from progress_tools import in_the_middle
from safetensors.torch import load_file

from fossil_export import convert, load_adapter, merge, plan_merge, plan_onnx, run_onnx, verify
from fossil_export.errors import AdapterError, CheckpointError, OnnxError
from fossil_export.merging._merge import run_merge

every_slab = progress_tools.every_slab


def _replace(path: Path) -> None:
    """Another file of the same header in its place, as a sync leaves it."""
    content = bytearray(path.read_bytes())
    content[-4:] = b"\0\0\0\1"
    partial = path.with_name("incoming")
    partial.write_bytes(content)
    partial.replace(path)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def _write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES = {"replaced": _replace, "cut": _cut, "written into": _write_into, "grown": _grow, "removed": Path.unlink}


def once_only(change: Callable[[], object]) -> Callable[[], None]:
    """A callback for progress, which several threads call, that makes the change the first time."""
    turns = itertools.count()

    def once() -> None:
        if next(turns) == 0:
            change()

    return once


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["base", "adapter", "tokenizer"])
def test_a_file_that_changes_after_the_plan_stops_the_merge(
    which: str, change: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "vocab.txt").write_text("a vocabulary of a hundred words or so, " * 4)
    path = {
        "base": sorted(base.glob("*.safetensors"))[0],
        "adapter": adapter / "adapter_model.safetensors",
        "tokenizer": base / "vocab.txt",
    }[which]
    plan = plan_merge(adapter)
    CHANGES[change](path)
    with pytest.raises(CheckpointError, match=f"{path.name}: "):
        plan.check()  # before anything of it is read
    with pytest.raises((CheckpointError, AdapterError), match=f"{path.name}: (changed while|cannot be read)"):
        run_merge(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("every_slab")
def test_a_base_that_changes_during_the_merge_stops_it(change: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The last file of the base, while the first is merged; and each of them, after its first slab."""
    for path in sorted(base.glob("*.safetensors")):
        kept = path.read_bytes()
        once = once_only(partial(CHANGES[change], path))
        with pytest.raises(CheckpointError, match=f"{path.name}: (changed while|cannot be read)"):
            merge(adapter, tmp_path / "merged", progress=in_the_middle(once))
        assert not (tmp_path / "merged").exists()
        path.write_bytes(kept)


@pytest.mark.parametrize("change", ["replaced", "written into"])
@pytest.mark.usefixtures("every_slab")
def test_verify_does_not_judge_a_base_that_changes(change: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    once = once_only(partial(CHANGES[change], sorted(base.glob("*.safetensors"))[0]))
    with pytest.raises(CheckpointError, match="changed while"):
        verify(tmp_path / "merged", level="weights", progress=in_the_middle(once))


@pytest.mark.parametrize("target", ["lora", "miss"])
def test_an_adapter_that_changes_while_it_is_converted_is_an_error(
    target: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fossil_export.converting._converters import CONVERTERS

    write = CONVERTERS[target].write

    def changing(*arguments: Any) -> Any:
        found = write(*arguments)
        _write_into(adapter / "adapter_model.safetensors")
        return found

    monkeypatch.setitem(CONVERTERS, target, replace(CONVERTERS[target], write=changing))
    with pytest.raises(AdapterError, match="changed while it was being read"):
        convert(adapter, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [_cut, _write_into, _replace])
def test_a_pickled_adapter_that_changes_after_it_was_read_is_an_error(
    change: Callable[[Path], None], adapter: Path, tmp_path: Path
) -> None:
    weights = adapter / "adapter_model.bin"
    torch.save(load_file(adapter / "adapter_model.safetensors"), weights)
    (adapter / "adapter_model.safetensors").unlink()
    loaded = load_adapter(adapter)
    change(weights)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        merge(loaded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _write_and_set_back(path: Path) -> None:
    """As `rsync --inplace -t` or `cp -p` leave a file: the same size, inode and time."""
    before = path.stat()
    _write_into(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_time_that_is_set_back_hides_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    for path in (sorted(base.glob("*.safetensors"))[0], base / "LICENSE", adapter / "adapter_model.safetensors"):
        plan = plan_merge(adapter)
        _write_and_set_back(path)
        with pytest.raises((CheckpointError, AdapterError), match=f"{path.name}: changed while"):
            run_merge(plan, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_modes_and_hard_links_are_no_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan = plan_merge(adapter)
    first, second, *_ = sorted(base.glob("*.safetensors"))
    first.chmod(first.stat().st_mode ^ 0o040)
    (tmp_path / "backup").hardlink_to(second)
    assert run_merge(plan, tmp_path / "merged").output.is_dir()


@pytest.mark.parametrize("change", [_replace, _write_and_set_back])
@pytest.mark.parametrize("which", ["base", "artifact", "config", "adapter"])
def test_no_verdict_on_files_that_change_while_models_run(
    which: str,
    change: Callable[[Path], None],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fossil_export.verifying import _verification

    merge(adapter, tmp_path / "merged")
    path = {
        "base": sorted(base.glob("*.safetensors"))[0],
        "artifact": sorted((tmp_path / "merged").glob("*.safetensors"))[0],
        "config": tmp_path / "merged" / "config.json",
        "adapter": adapter / "adapter_model.safetensors",
    }[which]
    monkeypatch.setattr(_verification, "check_forward", lambda *arguments: change(path))
    with pytest.raises((CheckpointError, AdapterError), match=f"{path.name}: changed while"):
        verify(tmp_path / "merged", level="forward")
    assert not (tmp_path / "merged" / "fossil_parity.json").exists()


@pytest.mark.parametrize("which", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_graph_that_changes_after_the_plan_stops_the_export(which: str, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    (graph.parent / "tokenizer.json").write_text("a tokenizer of a graph")
    plan = plan_onnx(case.adapter, case.base, mode="fused", onnx=graph)
    _replace(graph.parent / which)
    with pytest.raises(OnnxError, match=f"{which}: changed while"):
        run_onnx(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_tokenizer_that_changes_while_it_is_converted_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fossil_export.converting._converters import CONVERTERS

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text('{"a": "tokenizer"}')
    write = CONVERTERS["lora"].write

    def changing(*arguments: Any) -> Any:
        found = write(*arguments)
        _replace(adapter / "tokenizer.json")
        return found

    monkeypatch.setitem(CONVERTERS, "lora", replace(CONVERTERS["lora"], write=changing))
    with pytest.raises(AdapterError, match=r"tokenizer\.json: changed while"):
        convert(adapter, tmp_path / "out", to="lora")
    assert not (tmp_path / "out").exists()
