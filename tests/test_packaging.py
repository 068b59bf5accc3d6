"""What the package index, an installer and a citation read of the package."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

from fossil_export._extras import EXTRAS
from fossil_export.version import __version__

ROOT = Path(__file__).parents[1]
RELATIVE = re.compile(r'\]\((?!https?://)|\b(?:src|href|srcset)="(?!https?://)')
MODULES = {
    "onnxruntime-gpu": "onnxruntime", "onnxruntime-genai-cuda": "onnxruntime_genai", "onnx-ir": "onnx_ir",
    "onnxruntime-genai": "onnxruntime_genai",
}  # fmt: skip
DEVELOPERS = ("all", "docs", "test")  # no message asks for these


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def described(text: str) -> str:
    found = runpy.run_path(str(ROOT / "setup.py"))["absolute"](text, "1.2.3")
    assert isinstance(found, str)
    return found


def test_the_description_on_the_package_index_has_no_relative_link() -> None:
    text = described((ROOT / "README.md").read_text())
    assert not RELATIVE.findall(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def test_each_file_that_the_description_links_is_there() -> None:
    own = re.findall(
        r"fossil-export/fossil-export/(?:(?:blob|tree)/)?v1\.2\.3/([^)\s\"#]+)",
        described((ROOT / "README.md").read_text()),
    )
    assert own and all((ROOT / target).exists() for target in own)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[a](docs/hub.md#b)", "[a](https://github.com/fossil-export/fossil-export/blob/v1.2.3/docs/hub.md#b)"),
        ("[a](examples/)", "[a](https://github.com/fossil-export/fossil-export/tree/v1.2.3/examples)"),
        ("![a](docs/a.png)", "![a](https://raw.githubusercontent.com/fossil-export/fossil-export/v1.2.3/docs/a.png)"),
        ("[a](#b)", "[a](https://github.com/fossil-export/fossil-export/blob/v1.2.3/README.md#b)"),
        ("[a](https://x.y/z)", "[a](https://x.y/z)"),
        ('<img src="a.svg">', '<img src="https://raw.githubusercontent.com/fossil-export/fossil-export/v1.2.3/a.svg">'),
        ("```\n[a](b.md)\n```", "```\n[a](b.md)\n```"),
    ],
)
def test_a_link_becomes_the_address_of_the_release(given: str, expected: str) -> None:
    assert described(given) == expected


def test_the_messages_know_what_each_extra_brings(project: Any) -> None:
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in DEVELOPERS}

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            name, more = re.match(r"([\w-]+)(?:\[(.*)\])?", line).groups()  # type: ignore[union-attr]
            if name == "fossil-export":
                found.update(*(modules(one) for one in more.split(",")))
            else:
                found.add(MODULES.get(name, name))
        return found

    assert {name: modules(name) for name in extras} == {name: set(brought) for name, brought in EXTRAS.items()}


def test_what_the_manifest_takes_is_no_junk_to_the_check_of_the_sdist() -> None:
    junk = runpy.run_path(str(ROOT / ".ci" / "dist.py"))["JUNK"]
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    taken = [name for words in lines if words[:1] == ["include"] for name in words[1:]]
    assert ".gitattributes" in taken and not [name for name in taken if junk.search(name)]


@pytest.mark.parametrize(
    "name", [".git/HEAD", ".venv-docs/ready", "a/__pycache__/b", "a/b.pyc", "build/lib/a.py", "old.whl", ".coverage.1"]
)
def test_leftovers_are_junk_to_the_check_of_the_sdist(name: str) -> None:
    assert runpy.run_path(str(ROOT / ".ci" / "dist.py"))["JUNK"].search(name)


def test_the_repository_holds_no_package_of_anybody() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    held = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in held if name.endswith((".whl", ".tar.gz", ".pyc", ".so", ".egg-info"))]


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__} – " in (ROOT / "CHANGELOG.md").read_text()


def release(tmp_path: Path, changelog: str, version: str = "1.2.3") -> str:
    (tmp_path / "fossil_export").mkdir(exist_ok=True)
    (tmp_path / "fossil_export" / "version.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "CITATION.cff").write_text(f"version: {version}\n")
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    found = runpy.run_path(str(ROOT / ".ci" / "release.py"))["notes"]("v1.2.3", tmp_path)
    assert isinstance(found, str)
    return found


def test_the_notes_of_a_release_are_its_section(tmp_path: Path) -> None:
    changelog = "## Unreleased\n\n## 1.2.3 – 2026-12-01\n\n### Added\n\n- this\n\n## 1.2.2 – 2026-11-01\n\n- that\n"
    assert release(tmp_path, changelog) == "### Added\n\n- this\n"


@pytest.mark.parametrize(
    ("changelog", "version", "why"),
    [
        ("## Unreleased\n\n- left\n\n## 1.2.3 – 2026-12-01\n\n- this\n", "1.2.3", "lines under Unreleased"),
        ("## Unreleased\n\n## 1.2.3\n\n- this\n", "1.2.3", "has no date"),
        ("## Unreleased\n\n## 1.2.2 – 2026-12-01\n\n- this\n", "1.2.3", "has no section 1.2.3"),
        ("## 1.2.3 – 2026-12-01\n\n- this\n", "1.2.4", "make them the same"),
    ],
)
def test_a_release_that_is_not_ready_is_refused(changelog: str, version: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=why):
        release(tmp_path, changelog, version)


def test_the_sections_of_the_changelog_are_newest_first() -> None:
    found = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    numbers = [tuple(map(int, name.split("."))) for name in found[1:]]
    assert found[0] == "Unreleased" and numbers == sorted(numbers, reverse=True)


def test_the_picture_shows_every_room() -> None:
    picture = (ROOT / "docs" / "rooms.svg").read_text()
    rooms = {path.parent.name for path in (ROOT / "fossil_export").glob("*/__init__.py")} - {"tables"}
    assert {room for room in rooms if f">{room}/<" not in picture} == set()


def made(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """`make` in a folder of its own, with our Makefile."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in (".ci", "benchmarks", "docs", "examples", "fossil_export", "tests"):
        (folder / name).mkdir(exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *targets], cwd=folder, env=plain, capture_output=True, text=True, check=False)


def test_no_target_breaks_the_path_of_the_checkout_at_its_space(tmp_path: Path) -> None:
    told = made(tmp_path / "my checkout", "-n", "clean", "dist", "docs", "sweep", "torture", "scale", "mutants")
    assert told.returncode == 0 and str(tmp_path / "my checkout") in told.stdout
    assert str(tmp_path / "my") not in shlex.split(told.stdout)
    assert not [word for word in shlex.split(told.stdout) if word.startswith("checkout")]


def test_make_clean_removes_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    here, beside = tmp_path / "my checkout", tmp_path / "my"
    for name in (
        "build/dist/a.whl",
        ".venv/ready",
        ".venv-docs/ready",
        ".venv-dist/a",
        ".venv-versions/p/a",
        ".coverage.1",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    for name in (
        "fossil_export/kernels/_library.abi3.so",
        "tests/__pycache__/a.pyc",
        "fossil_export.egg-info/PKG-INFO",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    beside.mkdir()
    source = here / "fossil_export" / "kernels" / "kernels.c"
    source.touch()
    assert made(here, "clean").returncode == 0
    left = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "constraints.txt", "fossil_export/kernels/kernels.c"}
    assert beside.is_dir()


@pytest.mark.parametrize(
    ("parts", "code", "says"),
    [
        (["here"], 0, ""),
        (["gone", "here"], 0, "gone: passed over, no Python 3.99 here"),
        (["gone"], 1, "nothing was run"),
        (["here", "broken"], 1, "broken: failed"),
        (["unheard"], 1, "no such part"),
        ([], 1, "PART is not given"),
    ],
)
def test_a_part_of_the_matrix_that_fails_or_was_not_run_is_no_success(
    parts: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "versions.ini").write_text(
        "[here]\npython = 3\n[gone]\npython = 3.99\n[broken]\npython = 3\nbefore = broken\n"
    )
    matrix = runpy.run_path(str(ROOT / ".ci" / "versions.py"))
    install = matrix["install"]

    def installed(name: str, part: dict[str, str]) -> bool:
        if part["python"] == "3.99":
            return bool(install(name, part))
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)" if "before" in part else ""], check=True)
        return True

    inside = matrix["main"].__globals__
    for name, value in (("HERE", tmp_path), ("PLACES", tmp_path), ("WHEEL", tmp_path / "w"), ("install", installed)):
        monkeypatch.setitem(inside, name, value)
    monkeypatch.setattr(sys, "argv", ["versions.py", *parts])
    ended: object = 0
    try:
        matrix["main"]()
    except SystemExit as end:
        ended = end.code
    assert (1 if ended else 0) == code and says in f"{ended}{capsys.readouterr().out}"
