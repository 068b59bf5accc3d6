"""Many processes that write one path at once: what is there is the whole output of one, and nothing else is left."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import progress_tools
import pytest
from conftest import make_adapter, make_base
from graphs import Case, make_case, make_graph
from progress_tools import in_the_middle

import fossil_export
from fossil_export import convert, export_onnx, merge, verify
from fossil_export.errors import CheckpointError, FossilExportError
from fossil_export.writing import _staging as staging
from fossil_export.writing._scratch import scratch_folder
from fossil_export.writing._single_file import write_file

every_slab = progress_tools.every_slab
WRITERS = 8
PACKAGE = Path(fossil_export.__file__).parent
INTO_GIVEN = {
    "checkpoints/gguf/__init__.py", "checkpoints/gguf/_home.py", "converting/_lora.py", "converting/_miss.py",
    "converting/_record.py", "models/make_table.py", "onnx/_export.py",
    "models/_gguf.py", "onnx/_adapter_file.py", "onnx/builders/_existing.py", "onnx/builders/_genai.py",
    "onnx/builders/_torch.py", "onnx/graph/_check.py", "onnx/graph/_edit.py", "verifying/_lora.py",
    "storage/fsspec/_remote.py", "verifying/_onnx_models.py", "verifying/_peft_folder.py",
}  # fmt: skip
"""Files whose functions write into a staged or a scratch folder that they were given. `make_table` is a script."""
WRITES = {
    "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile", "copy2", "copyfile", "copytree", "hardlink_to", "link",
    "mkdtemp", "mkstemp", "rename_new", "save", "save_file", "save_pretrained", "symlink_to", "touch", "tofile",
    "write_bytes", "write_text",
}  # fmt: skip


def all_at_once(jobs: list[Callable[[], object]]) -> list[str | None]:
    """What each says that failed, None of those that did not; each runs in a process of its own, from one moment on."""
    context = multiprocessing.get_context("fork")
    together, told = context.Barrier(len(jobs)), context.SimpleQueue()

    def run(number: int, job: Callable[[], object]) -> None:
        together.wait()
        try:
            job()
            told.put((number, None))
        except FossilExportError as problem:
            told.put((number, str(problem)))
        except BaseException as problem:
            told.put((number, f"TRACEBACK {problem!r}"))

    processes = [context.Process(target=run, args=(number, job)) for number, job in enumerate(jobs)]
    for process in processes:
        process.start()
    found = dict(told.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[number] for number in range(len(jobs))]


def content(path: Path) -> dict[str, str]:
    """Hashes of a file, or of a folder's, but for the record, which tells the time."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = {file: file.name if path.is_file() else str(file.relative_to(path)) for file in files}
    return {
        names[file]: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name != "fossil_export.json"
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A base, an adapter and a graph of the base."""
    case = make_case(tmp_path_factory.mktemp("case"))
    make_graph(case, case.base.parent / "plain" / "model.onnx")
    return case


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of one base, each trained on other modules."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_base(folder / "base")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for module in modules:
        make_adapter(folder / module, base, target_modules=[module])
    return [folder / module for module in modules]


COMMANDS: dict[str, Callable[[Path, Path, bool], Any]] = {
    "merged": lambda adapter, out, again: merge(adapter, out, overwrite=again),
    "lora": lambda adapter, out, again: convert(adapter, out, to="lora", overwrite=again),
    "file": lambda adapter, out, again: convert(adapter, out, to="gguf-lora", overwrite=again),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", COMMANDS)
def test_one_output_of_many(kind: str, overwrite: bool, adapters: list[Path], tmp_path: Path) -> None:
    write = COMMANDS[kind]
    name = "out.gguf" if kind == "file" else "out"
    alone = []
    for adapter in adapters:
        (tmp_path / adapter.name).mkdir()
        write(adapter, tmp_path / adapter.name / name, False)
        alone.append(content(tmp_path / adapter.name / name))
    place = tmp_path / "place"
    place.mkdir()
    if overwrite:
        write(adapters[0], place / name, False)
    chosen = [adapters[number % len(adapters)] for number in range(WRITERS)]
    told = all_at_once([lambda one=one: write(one, place / name, overwrite) for one in chosen])  # type: ignore[misc]
    assert content(place / name) in alone
    assert [path.name for path in place.iterdir()] == [name]
    failed = [line for line in told if line is not None]
    assert len(failed) == (0 if overwrite else WRITERS - 1), told
    assert all("\n" not in line and "choose another --output" in line for line in failed), told


def test_other_commands_at_one_path(adapters: list[Path], case: Case, tmp_path: Path) -> None:
    graph = case.base.parent / "plain" / "model.onnx"
    jobs: list[Callable[[Path], Any]] = [
        lambda out: merge(adapters[0], out, overwrite=True),
        lambda out: convert(adapters[1], out, to="lora", overwrite=True),
        lambda out: export_onnx(case.adapter, out, base=case.base, mode="fused", onnx=graph, overwrite=True),
        lambda out: export_onnx(case.adapter, out, base=case.base, mode="swappable", onnx=graph, overwrite=True),
    ]
    alone = []
    for number, job in enumerate(jobs):
        job(tmp_path / str(number))
        alone.append(content(tmp_path / str(number)))
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    merge(adapters[3], out)
    told = all_at_once([lambda job=job: job(out) for job in jobs * 2])  # type: ignore[misc]
    assert told == [None] * 8
    assert content(out) in alone and [path.name for path in out.parent.iterdir()] == ["out"]


def test_certificates_and_reports_are_whole(adapters: list[Path], tmp_path: Path) -> None:
    merge(adapters[0], tmp_path / "merged")
    told = all_at_once(
        [lambda: verify(tmp_path / "merged", level="weights", report=tmp_path / "page.html")] * (WRITERS // 2)
    )
    assert told == [None] * (WRITERS // 2)
    assert json.loads((tmp_path / "merged" / "fossil_parity.json").read_text())["parity"] is True
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "page.html"]
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name.startswith(".")]


def test_files_are_never_seen_half_written(tmp_path: Path) -> None:
    pages = [bytes([number]) * 50_000 for number in range(WRITERS)]
    write_file(tmp_path / "file", pages[0])

    def write_and_look(number: int) -> None:
        for _ in range(25):
            write_file(tmp_path / "file", pages[number])
            if (tmp_path / "file").read_bytes() not in pages:
                raise FossilExportError("half-written")

    assert all_at_once([lambda n=n: write_and_look(n) for n in range(WRITERS)]) == [None] * WRITERS  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_are_never_lost(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system cannot exchange two names, and the old folder is set aside for a moment."""
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)

    def write(number: int) -> None:
        with staging.staged_folder(tmp_path / "out", 0, overwrite=True) as folder:
            for name in ("fossil_export.json", "a", "b"):
                (folder / name).write_text(str(number))

    def write_often(number: int) -> None:
        for _ in range(10):
            try:
                write(number)
            except FossilExportError as problem:
                if exchange or "cannot be put in place" not in str(problem):
                    raise

    write(0)
    assert all_at_once([lambda n=n: write_often(n) for n in range(WRITERS)]) == [None] * WRITERS  # type: ignore[misc]
    assert len({path.read_text() for path in (tmp_path / "out").iterdir()}) == 1
    assert len(list((tmp_path / "out").iterdir())) == 3
    write(9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scratch_folders_of_the_living_are_left_alone(tmp_path: Path) -> None:
    def use(number: int) -> None:
        for _ in range(10):
            with scratch_folder(tmp_path) as folder:
                (folder / "file").write_text(str(number))
                with scratch_folder(tmp_path):  # which clears up after the dead
                    pass
                if (folder / "file").read_text() != str(number):
                    raise FossilExportError("another one's")

    assert all_at_once([lambda n=n: use(n) for n in range(WRITERS)]) == [None] * WRITERS  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_scratch_folder_in_an_output_does_not_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, failing = os.unlink, [True, False]

    def unlink(*given: Any, **options: Any) -> None:
        if failing and failing.pop(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        removed(*given, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    with scratch_folder(tmp_path) as folder:
        (folder / "file").write_text("one")
    assert list(tmp_path.iterdir()) == []
    failing[:] = [True] * 9
    with pytest.raises(OSError, match="Input/output"), scratch_folder(tmp_path) as folder:
        (folder / "file").write_text("one")


@pytest.mark.usefixtures("every_slab")
def test_a_base_that_another_merge_replaces_is_not_mixed(adapters: list[Path], tmp_path: Path) -> None:
    merge(adapters[0], tmp_path / "base")
    turns = []

    def replace() -> None:
        turns.append(1)
        if len(turns) == 1:
            merge(adapters[1], tmp_path / "base", overwrite=True)

    with pytest.raises(CheckpointError, match="changed while it was being read"):
        merge(adapters[2], tmp_path / "merged", base=tmp_path / "base", progress=in_the_middle(replace))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def _writes(tree: ast.AST) -> set[str]:
    """Calls by which a file or folder comes into being, by name."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = [*node.args, *(key.value for key in node.keywords)]
        texts = {one.value for one in given if isinstance(one, ast.Constant)}
        is_written = name == "open" and texts & {"w", "wb", "a", "ab", "x", "xb", "r+b", "w+b", "r+"}
        flags = {one.attr for argument in node.args for one in ast.walk(argument) if isinstance(one, ast.Attribute)}
        if "devnull" in flags:
            continue
        if name in WRITES or is_written or flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}:
            found.add(name)
    return found


def test_nothing_is_written_but_through_one_room() -> None:
    """Whoever writes a file is in `writing/`, or is given the folder by whoever staged it."""
    writers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "writing" and _writes(ast.parse(path.read_text()))
    }
    assert writers == INTO_GIVEN
