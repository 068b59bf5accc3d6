"""A small graph and its adapter, and how an export of them must refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graphs import Case, make_case, make_graph

from fossil_export import FossilExportError, export_onnx


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.fixture
def graph(case: Case, tmp_path: Path) -> Path:
    return make_graph(case, tmp_path / "plain" / "model.onnx")


def refused(match: str, case: Case, tmp_path: Path, **options: Any) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FossilExportError, match=match) as caught:
        export_onnx(case.adapter, tmp_path / "out", **{"base": case.base, **options})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
