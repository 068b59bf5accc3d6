"""Inputs made to harm: patterns that take for ever, files that are huge, names that a terminal would obey."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import scene
from torture.fuzz.adapters import PeftFolders
from torture.fuzz.subject import Subject

PATTERNS = (
    *("(a+)+$", "(.*)*x", r"(.*a?)*(q_proj|x)$", r"([a-z._0-9]+)+\.down", "(a|a|.)*y", "(" * 5000, "a{9999999999}"),
    *(
        r"(.)\1*(.*)\2y",
        ".*" * 40 + "y",
        "(?:a?){60}x",
        r"(?P<a>.*)(?P=a)*x",
        "(?i)Q_PROJ",
        "[",
        "*",
        "\\",
        "x" * 2_000_000,
    ),
    *(
        r"((?:\w+\.)+)+q_proj",
        "(?=(a+))a*b",
        "(?:(?:(?:.*)*)*)*x",
        "|" * 100_000,
        "\x1b]0;x\x07",
        r".*\.q_proj|.*\.down_proj",
    ),
)
NAMES = ("\x1b[2J", "\u202egnp", "\ud800", "\x9b31m", "a\rb", "\x07", "\u2028", "\x1b]8;;http://x\x07y")


def _pattern(folder: Path, random: Random) -> str:
    field = random.choice(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"))
    pattern = random.choice(PATTERNS)
    values: dict[str, Any] = {field: {pattern: 4} if field.endswith("k_pattern") or field[0] == "a" else pattern}
    if field == "layers_pattern":
        values |= {"layers_to_transform": [0, 1]}
    _edit(folder / "adapter" / scene.CONFIG, values)
    return f"{field}: {pattern[:60]!r}"


def _huge(folder: Path, random: Random) -> str:
    name = random.choice(("adapter/adapter_config.json", "base/config.json", "base/generation_config.json"))
    name = random.choice((name, "base/model.safetensors.index.json", "adapter/adapter_model.safetensors"))
    size = random.choice((2**27, 2**30, 2**33, 2**40))
    with (folder / name).open("ab") as file:  # of holes: no disk is used
        os.truncate(file.fileno(), size)
    return f"{name}: {size} bytes, most of them zero"


def _many(folder: Path, random: Random) -> str:
    name = random.choice(("adapter/adapter_config.json", "base/config.json"))
    made: Callable[[], str] = random.choice(
        (
            lambda: '{"a": [' + "[],[]," * 2_000_000 + "1]}",
            lambda: '{"a": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
            lambda: '{"a": ' + "9" * 1_000_000 + "}",
            lambda: '{"a": "' + "x" * 50_000_000 + '"}',
            lambda: "{" + ", ".join(f'"{number}": 1' for number in range(300_000)) + "}",
        )
    )
    (folder / name).write_text(made())
    return f"{name}: many parts"


def _names(folder: Path, random: Random) -> str:
    name = random.choice(NAMES)
    file = random.choice(("adapter/adapter_config.json", "base/config.json"))
    path = folder / file
    config = json.loads(path.read_bytes())
    key = random.choice([*config, name])
    kept = config.get(key)
    config[key] = random.choice((name, [name], {name: name}, [kept, name], {name: kept}))
    path.write_text(json.dumps(config))
    return f"{file}: {key!r} has {name!r}"


def _absurd(folder: Path, random: Random) -> str:
    path = folder / "base" / scene.BASE_CONFIG
    config = json.loads(path.read_bytes())
    numbers = [key for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    key, value = random.choice(numbers), random.choice((10**5, 10**7, 2**31, 2**63, 10**100, -1, 0, 10**4299))
    _edit(path, {key: value})
    return f"{key} is {str(value)[:30]}"


def _files(folder: Path, random: Random) -> str:
    """What is no file in the place of one."""
    path = folder / random.choice(
        (
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "base/config.json",
            "base/model.safetensors",
        )
    )
    path.unlink()
    way = random.choice(("pipe", "folder", "zero", "loop", "gone"))
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "zero":
        path.symlink_to("/dev/zero")
    elif way == "loop":
        path.symlink_to(path.name)
    return f"{path.name}: {way}"


WAYS: Mapping[str, Callable[[Path, Random], str]] = {
    "patterns": _pattern, "huge files": _huge, "many parts": _many, "names": _names, "absurd sizes": _absurd,
    "no files": _files,
}  # fmt: skip


@dataclass(frozen=True)
class Hostile(PeftFolders):
    """`WAYS` has how, by the end of the name."""

    def mutate(self, folder: Path, random: Random) -> str:
        kind = self.place_adapter(folder, random)
        return f"{kind}: {WAYS[self.name.removeprefix('hostile ')](folder, random)}"

    def command(self, folder: Path, random: Random) -> list[str]:
        if random.random() < 0.3:
            return ["inspect", str(folder / "adapter"), *random.choice(([], ["--json"]))]
        return super().command(folder, random)


def _edit(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


SUBJECTS: list[Subject] = [Hostile(f"hostile {name}", (), ("tile", "lora", "ia3")) for name in WAYS]
