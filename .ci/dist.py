"""What `make dist` asks of the wheel and the sdist in a folder: what is in them, and that each merges in an
environment that has nothing else.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import BytesParser
from email.policy import EmailPolicy
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEEL = (
    "fossil_export/py.typed", "fossil_export/__init__.pyi", "fossil_export/models/architectures.json",
    "fossil_export/models/bypassed.json", "fossil_export/kernels/_library.*.so",
)  # fmt: skip
SDIST = (
    "pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt",
    "fossil_export/kernels/kernels.c", "fossil_export/kernels/compare.c", "fossil_export/py.typed",
    "fossil_export/models/architectures.json", "tests/conftest.py", "tests/loopback/server.py", "examples/demo.py",
    "benchmarks/merge.py", "docs/extending.md", ".ci/installed.py",
)  # fmt: skip
JUNK = re.compile(
    r"\.(py[cod]|whl|log)$|(^|/)(__pycache__|build|\.(git|venv[^/]*|hypothesis|(mypy|ruff|pytest)_cache))/|(^|/)\.coverage"
)
RELATIVE = re.compile(r"""\]\((?!https?://)|\b(?:src|href|srcset)="(?!https?://)|^\[[^\]]+\]:\s+(?!https?://)""", re.M)


def check_names(names: list[str], wanted: tuple[str, ...], what: str) -> None:
    missing = [one for one in wanted if not any(Path(name).match(one) for name in names)]
    junk = [name for name in names if JUNK.search(name)]
    assert not missing and not junk, f"{what}: missing {missing}, and not to be there {junk}"


def check_description(metadata: bytes) -> None:
    """No link that the package index cannot follow, and each of ours leads to a file that is there."""
    found = BytesParser(policy=EmailPolicy(max_line_length=0)).parsebytes(metadata)
    text = found.get_payload()
    assert isinstance(text, str) and found["Description-Content-Type"] == "text/markdown"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not (left := RELATIVE.findall(prose)), f"relative links in the description: {left}"
    own = re.findall(rf"fossil-export/fossil-export/(?:blob/|tree/)?v{re.escape(found['Version'])}/([^)\s\"#]+)", text)
    assert own, "no link to a file of the release"
    for target in own:
        assert (ROOT / target).exists(), f"{target} is linked and not there"


def merge_with(package: Path, room: Path) -> None:
    """Install `package` into an environment of its own, and merge there."""
    subprocess.run([sys.executable, "-m", "venv", room / "venv"], check=True)
    programs = room / "venv" / "bin"
    install = [
        programs / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        package.absolute(),
    ]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([programs / "fossil-export", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.strip().rpartition(" ")[2] in package.name, done.stdout
    script = ROOT / ".ci" / "alone.py"
    subprocess.run([programs / "python", "-I", script], cwd=room, env=environment, check=True)


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        check_names(names, WHEEL, wheel.name)
        check_description(file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))))
    with tarfile.open(sdist) as file:
        members = [member.name for member in file.getmembers() if member.isfile()]
        names = [name.partition("/")[2] for name in members]
        check_names(names, SDIST, sdist.name)
        metadata = file.extractfile(next(name for name in members if name.endswith("/PKG-INFO")))
        assert metadata is not None
        check_description(metadata.read())
    for package in (wheel, sdist):
        with tempfile.TemporaryDirectory() as room:
            merge_with(package, Path(room))
        print(f"{package.name}: {package.stat().st_size:,} bytes, complete, and merges by itself")


if __name__ == "__main__":
    main()
