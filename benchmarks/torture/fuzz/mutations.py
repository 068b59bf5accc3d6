"""Damage that any format can have: to bytes, and to the tree of a JSON document."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "../x", "/etc/passwd", "\ud800", "\x1b[2J", "é" * 300, "(a+)+$", "x" * 100_000),
    *([], {}, [[]], [None], ["q_proj", 3], {"": ""}),
)
"""Values that a field may hold in the place of its own."""


def damage_bytes(content: bytes, random: Random) -> tuple[bytes, str]:
    """Another content, and how it came about."""
    size = len(content)
    at = random.randrange(size + 1)
    count = min(random.choice((1, 1, 2, 8, 64, 4096)), max(1, size))
    way = random.choice(("flip", "cut", "insert", "drop", "repeat", "zero", "empty", "grow"))
    if way == "flip" and size:
        at = min(at, size - 1)
        return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :], f"bit of byte {at}"
    if way == "cut":
        return content[:at], f"cut to {at} bytes"
    if way == "insert":
        return content[:at] + random.randbytes(count) + content[at:], f"{count} bytes put in at {at}"
    if way == "drop":
        return content[:at] + content[at + count :], f"{count} bytes taken out at {at}"
    if way == "repeat":
        return content[: at + count] + content[at:], f"{count} bytes twice at {at}"
    if way == "zero":
        return content[:at] + bytes(min(count, size - at)) + content[at + count :], f"{count} bytes zero at {at}"
    if way == "empty":
        return b"", "empty"
    return content + random.randbytes(count), f"{count} bytes more"


def damage_file(path: Path, random: Random) -> str:
    content, how = damage_bytes(path.read_bytes(), random)
    path.write_bytes(content)
    return f"{path.name}: {how}"


def damage_tree(value: Any, random: Random) -> tuple[Any, str]:
    """`value` (of JSON) with one place changed: a value that is odd or of another field, a key gone, renamed, added."""
    places = list(_places(value))
    if not places:
        return random.choice(ODD), "odd value for the whole"
    parent, key = random.choice(places)
    named = f"{key!r}"[:80]
    way = random.choice(("odd", "odd", "odd", "other", "gone", "renamed", "added", "near"))
    if way == "other":
        other, from_key = random.choice(places)
        parent[key] = json.loads(json.dumps(other[from_key]))
        return value, f"{named} has the value of {from_key!r}"
    if way == "gone":
        del parent[key]
        return value, f"{named} is gone"
    if way == "renamed" and isinstance(parent, dict):
        parent[f"{key}{random.choice(('x', '_', ' ', '.0'))}"] = parent.pop(key)
        return value, f"{named} is renamed"
    if way == "added" and isinstance(parent, dict):
        parent[random.choice(("auto_map", "quantization_config", "extra", "", "\x1b[2J"))] = random.choice(ODD)
        return value, f"a field beside {named}"
    if way == "near" and isinstance(parent[key], int) and not isinstance(parent[key], bool):
        parent[key] += random.choice((-1, 1, 8, -8))
        return value, f"{named} is {parent[key]}"
    odd = random.choice(ODD)
    parent[key] = odd
    return value, f"{named} is {odd!r}"[:200]


def damage_json(path: Path, random: Random) -> str:
    """Its tree, or now and then its bytes."""
    if random.random() < 0.1:
        return damage_file(path, random)
    value, how = damage_tree(json.loads(path.read_bytes()), random)
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {how}"


def _places(value: Any) -> Any:
    """Each (dict or list, key or index) in the tree."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
