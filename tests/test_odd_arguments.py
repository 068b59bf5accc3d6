"""What only looks like an argument of a function: nothing is made of it, and the line names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_adapter, make_base
from peft import LoraConfig

from fossil_export import convert, merge, merge_part, plan_merge, run_merge, verify
from fossil_export.errors import FossilExportError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    base = make_base(root / "base")
    make_adapter(root / "adapter", base, kind=LoraConfig, r=2, target_modules=["q_proj"])
    return root


@pytest.mark.parametrize("given", [{2.0: 1.0}, {0.5}, b"\x02", "2", np.array(2.0)])
def test_weights_are_numbers_in_an_order(given: Any, made: Path) -> None:
    with pytest.raises(TypeError, match=r"^plan_merge: weights is .*, expected a list of numbers$"):
        plan_merge(made / "adapter", weights=given)


def test_an_array_without_axes_is_neither_adapters_nor_a_part(made: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^merge: adapter is array"):
        merge(np.array(3), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^merge_part: part is array"):
        merge_part(plan_merge(made / "adapter"), tmp_path / "out", np.array(3))  # type: ignore[arg-type]


def test_a_beginning_that_is_no_time_is_told_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    plan = plan_merge(made / "adapter")
    with pytest.raises(TypeError, match=r"^run_merge: started is 'now'"):
        run_merge(plan, tmp_path / "out", started="now")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_half_a_character_is_in_no_path(made: Path) -> None:
    for name in ("prompts", "report"):
        with pytest.raises(FossilExportError, match=r"^'\\ud800': is no usable path: "):
            verify(made / "base", **{name: "\ud800"})


def test_a_base_config_with_a_name_too_long_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match=r"^x+: .*File name too long; [^\n]+$"):
        convert(made / "adapter", tmp_path / "out", to="lora", base=made / "base", base_config="x" * 5000)
