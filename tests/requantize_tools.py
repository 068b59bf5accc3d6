"""Merges that keep the base's quantization, one of each format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from quantized_kept import CASES, Case

import fossil_export

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Case, Path]]:
    """A base of the format that is named, its adapter and the merge that keeps the format; made once, only read."""

    @cache
    def case(name: str) -> tuple[Case, Path]:
        work = tmp_path_factory.mktemp(name.replace(" ", "_"))
        found = CASES[name](work)
        merge(found, work / "merged")
        return found, work / "merged"

    return case


def merge(case: Case, folder: Path, **options: Any) -> fossil_export.MergeResult:
    return fossil_export.merge(
        case.adapter, folder, base=case.quantized, requantize=True, **{"min_survival": 0, **options}
    )


def verified(case: Case, folder: Path, level: Any = "weights") -> fossil_export.Verification:
    return fossil_export.verify(folder, adapter=case.adapter, base=case.quantized, level=level)
