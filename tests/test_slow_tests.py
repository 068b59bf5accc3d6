"""The list of slow tests: what it is made from, what it leaves of each file, and that it does not rot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import slow_tests
from slow_tests import chosen, measured, unknown

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_a" name="test_quick" time="0.05"/>
<testcase classname="tests.test_a" name="test_cases[x[0]-1]" time="0.15"/>
<testcase classname="tests.test_a" name="test_cases[2]" time="1.25"/>
<testcase classname="tests.test_a.TestGroup" name="test_inside" time="0.3"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    (tmp_path / "tests.xml").write_text(REPORT)
    return tmp_path / "tests.xml"


def test_all_listed_tests_exist() -> None:
    """Where one was renamed or is gone, change its line in slow.txt or take it out."""
    assert unknown(slow_tests.slow_tests()) == []


def test_a_test_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("class TestIt:\n    def test_there(self): pass\n")
    listed = [("test_a.py", "test_there"), ("test_a.py", "test_gone"), ("test_b.py", "test_there")]
    assert unknown(listed, tmp_path) == ["test_a.py::test_gone", "test_b.py::test_there"]


def test_the_longest_case_of_a_test_decides(report: Path) -> None:
    longest, together = measured(report)
    quick, cases, inside = (("test_a.py", name) for name in ("test_quick", "test_cases", "test_inside"))
    assert longest == {quick: 0.05, cases: 1.25, inside: 0.3}
    assert together == pytest.approx({quick: 0.05, cases: 1.4, inside: 0.3})


def test_the_list_is_written_and_checked(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_tests, "LIST", tmp_path / "slow.txt")
    monkeypatch.setattr(slow_tests.slow_tests, "__defaults__", (tmp_path / "slow.txt",))
    monkeypatch.setattr(sys, "argv", ["slow_tests", str(report), "--check"])
    slow_tests.main()
    told = capsys.readouterr().out
    assert "1.2 s test_a.py::test_cases is not in" in told and "test_inside" not in told
    monkeypatch.setattr(sys, "argv", ["slow_tests", str(report)])
    slow_tests.main()
    assert slow_tests.slow_tests() == {("test_a.py", "test_cases"): 1.4, ("test_a.py", "test_inside"): 0.3}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["slow_tests", str(report), "--check"])
    slow_tests.main()
    assert capsys.readouterr().out == ""


def test_of_each_file_something_is_run() -> None:
    slow = {("b", "long"): 9.0, ("b", "longer"): 10.0, ("a", "long"): 1.0}
    assert chosen([("a", "quick"), ("a", "long"), ("b", "longer"), ("b", "long")], slow) == {
        ("a", "quick"),
        ("b", "long"),
    }
