"""Merges that are interrupted, what is kept of them, and what is written again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json

from fossil_export import merge
from fossil_export.merging._run import Writer
from fossil_export.writing._journal import Journal


class Stop(BaseException):
    """An interruption."""


@pytest.fixture
def own(parts: Path, tmp_path: Path) -> Path:
    """A base in seven files and an adapter of its q_proj and v_proj, to be changed."""
    for name in ("base", "qv", "k"):
        shutil.copytree(parts / name, tmp_path / name)
        if name != "base":
            edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


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
