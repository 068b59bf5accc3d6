"""All cases with one checkout, and what came of it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from same import hub_cases
from same.cases import Case

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
ACCIDENTS = {"seconds", "peak_memory"}
_TIMES = re.compile(rb"^(time +|peak memory +).*$|; [\d.]+ s\. ", re.MULTILINE)
_PARTIAL = re.compile(rb"\.partial-[0-9a-f]{8}")
"""The rest of the name of an unfinished output, which is drawn at random."""
_WORKER = Path(__file__).with_name("worker.py")


def run(checkout: Path, cases: Mapping[str, Case], inputs: Path, work: Path, jobs: int) -> dict[str, dict[str, bytes]]:
    """What each case gave, and what is in `inputs` afterwards: content, by the name of a file or stream.

    `work` must be the same path for both checkouts, so that no output can differ by it; it must not exist yet.
    """
    work.mkdir()
    kinds: dict[str, list[str]] = {}
    for name, case in cases.items():
        (work / "cases" / name).mkdir(parents=True)
        kinds.setdefault(case.kind, []).append(name)
    found: dict[str, dict[str, bytes]] = {}
    with hub_cases.running(work / "hub", inputs) if "push" in kinds else nullcontext() as hub:
        with ThreadPoolExecutor(jobs) as pool:
            runs = {}
            for kind, names in kinds.items():
                commands = [_filled(cases[name], name) for name in names]
                environment = hub.environment if hub is not None and kind == "push" else _offline(work / kind)
                runs[kind] = pool.submit(_run_kind, checkout, commands, work / kind, environment)
        for kind, names in kinds.items():
            for name, results in zip(names, runs[kind].result(), strict=True):
                found[name] = _streams(results)
        for path, content in _files(work / "cases"):
            name, _, rest = path.partition("/")
            if rest:  # not the case's own folder
                found[name][rest] = content
        found["inputs"] = dict(_files(inputs))
        if hub is not None:
            for path, content in hub.published().items():
                owner = path.removeprefix("ada/").partition("@")[0]
                found.setdefault(owner if owner in cases else "hub", {})[path] = content
            found = {name: {key: hub.plain(value) for key, value in one.items()} for name, one in found.items()}
    return found


def _filled(case: Case, name: str) -> list[list[str]]:
    words = {"{case}": f"cases/{name}", "{name}": name}
    return [[_replaced(word, words) for word in command] for command in case.commands]


def _replaced(word: str, words: Mapping[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(name, value)
    return word


def _offline(folder: Path) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "TRANSFORMERS_VERBOSITY": "error"}


def _run_kind(
    checkout: Path, commands: list[list[list[str]]], own: Path, environment: Mapping[str, str]
) -> list[list[dict[str, Any]]]:
    """The results of the commands of all cases of a kind, run in one process, which keeps its own files in `own`."""
    own.mkdir()
    (own / "jobs.json").write_text(json.dumps(commands))
    environment = {**environment, **ONE_THREAD, "PYTHONPATH": str(checkout), "TMPDIR": str(own), "COLUMNS": "100"}
    command = [sys.executable, str(_WORKER), str(own / "jobs.json"), str(own / "results.json"), str(checkout)]
    with (own / "log").open("wb") as log:
        done = subprocess.run(
            command, cwd=own.parent, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    if done.returncode or not (own / "results.json").exists():
        last = (own / "log").read_text(errors="replace").strip().splitlines()[-5:]
        raise SystemExit(f"{checkout}: the process of the cases of {own.name} ended with {done.returncode}: {last}")
    results: list[list[dict[str, Any]]] = json.loads((own / "results.json").read_text())
    return results


def _streams(results: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Exit code, streams and crash of each command; without the times and the memory."""
    found: dict[str, bytes] = {}
    for number, result in enumerate(results, 1):
        with suppress(ValueError):  # it is text
            result["stdout"] = json.dumps(_without(json.loads(result["stdout"])), ensure_ascii=False)
        for name, value in result.items():
            found[f"command {number}: {name}"] = _PARTIAL.sub(b".partial-", _TIMES.sub(rb"\1-", str(value).encode()))
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry) for key, entry in value.items() if key not in ACCIDENTS}
    return [_without(entry) for entry in value] if isinstance(value, list) else value


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The content of every file, the target of every link, and the permissions of these and of folders."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        yield f"{name} (mode)", stat.filemode(path.lstat().st_mode).encode()
        if path.is_symlink():
            yield name, os.fsencode(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
            yield name, _TIMES.sub(b"", content) if path.suffix == ".html" else content
