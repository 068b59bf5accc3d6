"""What plans and results show of themselves: tables by kind of row, short reprs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import fossil_export
from fossil_export import convert, inspect, load_adapter, merge, verify
from fossil_export._grouping import grouped


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
