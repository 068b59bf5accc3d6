"""The parts of versions.ini: `python .ci/versions.py PART …`, or `list`, or `cheap` for those that .ci/run runs."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PLACES = ROOT / ".venv-versions"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
WHEEL = PLACES / f"wheel-{os.getpid()}"  # parts may be run at once
TORCH = os.environ.get("TORCH_OPTIONS", "").split()
DEVELOPERS = Path(os.environ.get("VENV", ".venv"))
AT_ONCE = os.environ.get("AT_ONCE", "").split()


def parts() -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser()
    parser.read(HERE / "versions.ini")
    return {name: dict(parser[name]) for name in parser.sections()}


def interpreter(wanted: str) -> str | None:
    """Python `wanted` ("3.13"): $PYTHON_3_13, the one that runs this, on the PATH or of pyenv; or None."""
    told = os.environ.get(f"PYTHON_{wanted.replace('.', '_')}")
    own = sys.executable if sys.version_info[:2] == tuple(map(int, wanted.split("."))) else None
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [told, own, shutil.which(f"python{wanted}"), *map(str, sorted(root.glob(f"{wanted}.*/bin/python")))]
    for path in filter(None, found):
        ask = [path, "-c", f"import sys, venv; assert sys.version_info[:2] == {tuple(map(int, wanted.split('.')))}"]
        if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
            return path
    return None


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), check=True, text=True, cwd=options.pop("cwd", ROOT), **options)
    return done.stdout or ""


def wheel() -> Path:
    """The wheel of this checkout, made once a call."""
    folder = WHEEL
    found = sorted(folder.glob("*.whl"))
    if not found:
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # nothing of an earlier checkout comes along
        run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, ".")
        found = sorted(folder.glob("*.whl"))
    return found[0]


def install(name: str, part: dict[str, str]) -> bool:
    """The wheel in an environment of its own, after what was there; False if the interpreter is missing."""
    source = interpreter(part["python"])
    if source is None:
        print(f"{name}: passed over, no Python {part['python']} here (PYTHON_{part['python'].replace('.', '_')}=…)")
        return False
    place = PLACES / name
    shutil.rmtree(place, ignore_errors=True)
    run(source, "-m", "venv", place)
    python = place / "bin" / "python"
    for line in filter(None, part.get("before", "").splitlines()):
        run(python, *PIP, "install", *(TORCH if line.startswith("torch") else ()), *line.split())
    before = run(python, *PIP, "freeze", stdout=subprocess.PIPE).splitlines()
    pins = place / "pins.txt"
    pins.write_text("\n".join(part.get("pins", "").split()))
    extras = part.get("extras", "").split()
    wanted = f"{wheel()}[{','.join(extras)}]" if extras else wheel()
    run(python, *PIP, "install", "-c", pins, wanted, *part.get("also", "").split())
    after = run(python, *PIP, "freeze", stdout=subprocess.PIPE).splitlines()
    if moved := sorted(set(before) - set(after)):
        raise SystemExit(f"{name}: the installation moved {', '.join(moved)}")
    run(python, *PIP, "check", stdout=subprocess.PIPE)
    (place / "work").mkdir()
    more = [*(["--torch"] if part.get("torch") else []), *(f"--{name}" for name in ("onnx", "genai") if name in extras)]
    print(f"{name}: ", end="", flush=True)
    run(python, "-I", HERE / "installed.py", *more, cwd=place / "work")
    return True


def overlay(name: str, part: dict[str, str]) -> None:
    """Tests with other packages laid over the environment of `make test`."""
    place, python = PLACES / name, DEVELOPERS / "bin" / "python"
    shutil.rmtree(place, ignore_errors=True)
    run(python, *PIP, "install", "--no-deps", "--target", place, *part["before"].split())
    mine = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
    text = " ".join((ROOT / one).read_text() if one.endswith(".txt") else one for one in part["before"].split())
    laid = [one.split("==") for one in text.split() if "==" in one]
    ask = f"from importlib.metadata import version as of; assert all(of(name) == it for name, it in {laid})"
    run(python, "-c", ask, env=mine)
    files = [path for name in part["tests"].split() for path in sorted((ROOT / "tests").glob(name))]
    print(f"{name}:", flush=True)
    run(python, "-m", "pytest", *AT_ONCE, *files, env=mine)


def main() -> None:
    known = parts()
    asked = sys.argv[1:]
    if asked == ["list"]:
        for name, part in known.items():
            print(name, "(.ci/run)" if part.get("cheap") else "")
        return
    if "cheap" in asked:
        asked = [*(name for name, part in known.items() if part.get("cheap")), *(n for n in asked if n != "cheap")]
    if unknown := [name for name in asked if name not in known] or not asked:
        raise SystemExit(f"{unknown if asked else 'PART is not given'}: no such part; make list-versions shows them")
    ran = 0
    try:
        for name in asked:
            part = known[name]
            if "tests" in part:
                overlay(name, part)
                ran += 1
            else:
                ran += install(name, part)
            shutil.rmtree(PLACES / name, ignore_errors=True)
    except subprocess.CalledProcessError as problem:
        raise SystemExit(f"{name}: failed: {problem}") from problem
    finally:
        shutil.rmtree(WHEEL, ignore_errors=True)
    if not ran:
        raise SystemExit("nothing was run")


if __name__ == "__main__":
    main()
