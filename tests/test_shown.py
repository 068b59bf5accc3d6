"""What plans and results show of themselves: tables by kind of row, short reprs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import public_tools
import pytest
from conftest import edit_json, make_adapter, weights
from hypothesis import given
from hypothesis import strategies as st
from public_tools import NAMES
from safetensors.torch import save_file

import fossil_export
from fossil_export import convert, finish_merge, inspect, load_adapter, merge, merge_part, plan_merge, verify
from fossil_export._grouping import grouped
from fossil_export._shown import table

made = public_tools.made


def test_layers_of_one_kind_are_one_row() -> None:
    rows = [(f"model.layers.{n}.{part}", "8x4") for n in (0, 1, 2, 5) for part in ("q", "k")]
    assert [(group.cells[0], len(group)) for group in grouped(rows)] == [
        ("model.layers.{0–2,5}.q", 4),
        ("model.layers.{0–2,5}.k", 4),
    ]


def test_experts_of_all_layers_are_one_row() -> None:
    rows = [
        (f"layers.{layer}.experts.{expert}.up", f"from.{layer}.{expert}") for layer in range(3) for expert in range(8)
    ]
    (group,) = grouped(rows)
    assert group.cells == ("layers.{0–2}.experts.{0–7}.up", "from.{0–2}.{0–7}") and len(group) == 24


def test_other_shapes_are_other_rows_and_names_without_numbers_stay() -> None:
    rows = [("layers.0.q", "8x4"), ("layers.1.q", "8x2"), ("conv1.weight", "8x4"), ("conv2.weight", "8x4")]
    assert [group.cells for group in grouped(rows)] == rows


def test_scattered_numbers_are_cut_short() -> None:
    (group,) = grouped([(f"layers.{n}.q",) for n in range(0, 40, 2)])
    assert group.cells == ("layers.{0,2,4,6,…}.q",)


@given(st.lists(st.tuples(st.text("ab.01{}–", max_size=9), st.text("x12.", max_size=4)), max_size=30))
def test_no_row_is_lost(rows: list[tuple[str, str]]) -> None:
    groups = grouped(rows)
    assert sorted(place for group in groups for place in group.members) == list(range(len(rows)))
    for group in groups:
        if len(group) == 1:
            assert group.cells == rows[group.members[0]]


def test_results_show_themselves_in_a_few_lines(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = merge(adapter, tmp_path / "merged")
    found = verify(tmp_path / "merged", level="weights")
    converted = convert(adapter, tmp_path / "lora", to="lora")
    for thing in (load_adapter(adapter), result.plan, result.plan.base, result, found, inspect(adapter), converted):
        text = repr(thing)
        assert text.startswith(f"<{type(thing).__name__}") and len(text) < 1200 and "\n" not in text
    assert "merge 14, copy 7" in repr(result.plan) and "parity" in repr(found)
    assert "14 modules" in repr(load_adapter(adapter)) and "14 of 21 tensors" in repr(result)


def test_the_package_lists_its_names() -> None:
    assert dir(fossil_export) == sorted(fossil_export.__all__)
    for name in fossil_export.__all__:
        assert getattr(fossil_export, name) is not None


def test_the_package_may_lie_in_a_zip_file(tmp_path: Path) -> None:
    package = Path(fossil_export.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in [*package.rglob("*.py"), *package.rglob("*.pyi")]:
            file.write(path, path.relative_to(package.parent))
    script = (
        "import sys; sys.path.insert(0, 'all.zip'); import fossil_export as it; print(it.__file__, len(it.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "all.zip" in done.stdout and done.stdout.split()[-1] == str(len(fossil_export.__all__))


class Cells(HTMLParser):
    """The tags of a text, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVIL = "<script>alert(1)</script>\x1b[2J"


def shown(made: Path, folder: Path) -> list[Any]:
    """One of each plan and result that needs no network, with a name to fear in each."""
    adapter = folder / f"ad{EVIL.replace('/', '')}"
    make_adapter(adapter, made / "base")
    plan = plan_merge(adapter, made / "base")
    part = merge_part(plan, folder / "parts", (1, 1))
    result = finish_merge(plan, folder / "parts")
    found = [load_adapter(adapter), plan, part, result, inspect(adapter), verify(folder / "parts", level="weights")]
    return [*found, convert(adapter, folder / "lora", to="lora"), fossil_export.plan_onnx(adapter)]


def test_plans_and_results_are_a_line_and_a_harmless_table(made: Path, tmp_path: Path) -> None:
    for one in shown(made, tmp_path):
        assert repr(one) == str(one) and len(repr(one)) < 1000 and repr(one).isprintable(), repr(one)
        assert repr(one).startswith(f"<{type(one).__name__} ")
        cells = Cells(one._repr_html_())
        assert not cells.open and set(cells.tags) <= {"div", "table", "caption", "tbody", "tr", "th", "td", "ul", "li"}
        assert "\x1b" not in one._repr_html_() and len(one._repr_html_()) < 10_000
        assert "color:#" not in one._repr_html_() and "background" not in one._repr_html_()  # light and dark alike
    names = [type(one).__name__ for one in shown(made, tmp_path / "more")]
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.endswith(("Plan", "Result")) or name in ("Adapter", "Verification")]
)
def test_every_result_has_both(name: str) -> None:
    kind = getattr(fossil_export, name)
    assert "_repr_html_" in vars(kind) and "__repr__" in vars(kind) and kind.__repr__.__module__.startswith("fossil")


def test_thousands_of_problems_are_still_short(made: Path, tmp_path: Path) -> None:
    tensors = weights(made / "adapter")
    for values in tensors.values():
        values.view(-1)[0] = float("nan")
    make_adapter(tmp_path / "adapter", made / "base")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    found = inspect(tmp_path / "adapter")
    assert len(found.problems) == 14 and len(repr(found)) < 900
    assert found._repr_html_().count("<li") == 9 and "and 6 more" in found._repr_html_()
    assert len(table("x" * 10**6, [("a", "b" * 10**6)], ["c" * 10**6] * 10**5)) < 5000


def test_an_adapter_of_whole_tensors_alone_can_be_shown(made: Path, tmp_path: Path) -> None:
    adapter = load_adapter(made / "adapter")
    object.__setattr__(adapter, "trained", {})
    assert repr(adapter).startswith("<Adapter ") and "modules" in adapter._repr_html_()


def test_edited_config_is_shown_in_the_plan(made: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", made / "base")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(made / "base"))
    assert "dtype = bfloat16" in plan_merge(tmp_path / "adapter", dtype="bfloat16")._repr_html_()
