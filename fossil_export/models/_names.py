"""Many dotted names in one short string: `layers.*.mlp.{up,down}.{bias,weight}`, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SPECIAL = frozenset("{},")


def pack(names: Iterable[str]) -> str:
    """One string for a set of names, always the same one. Names hold no braces or commas."""
    tree: dict[str, Any] = {}
    for name in sorted(set(names)):
        if _SPECIAL & set(name) or not name:
            raise ValueError(f"{name!r} cannot be packed")
        branch = tree
        for word in name.split("."):
            branch = branch.setdefault(word, {})
        branch[""] = {}
    return _alternatives(tree)[1:-1]


def _alternatives(tree: Mapping[str, Any]) -> str:
    ends: dict[str, list[str]] = {}
    for word, branch in tree.items():
        ends.setdefault(_rest(branch), []).append(word)
    return "{" + ",".join(sorted(_group(words) + rest for rest, words in ends.items())) + "}"


def _group(words: list[str]) -> str:
    return words[0] if len(words) == 1 else "{" + ",".join(sorted(words)) + "}"


def _rest(branch: Mapping[str, Any]) -> str:
    """What follows a word: nothing if a name ends there, ".…" if it goes on, both in braces."""
    longer = {word: below for word, below in branch.items() if word}
    if not longer:
        return ""
    inner = _alternatives(longer)
    one = "." + (inner if _several(inner) else inner[1:-1])
    return "{," + one + "}" if "" in branch else one


def _several(inner: str) -> bool:
    depth = 0
    for letter in inner[1:-1]:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            return True
    return False


def unpack(text: str) -> frozenset[str]:
    """The names of `pack`."""
    return frozenset(_read("{" + text + "}", 0)[0]) if text else frozenset()


def _read(text: str, at: int) -> tuple[list[str], int]:
    """The words of the braces that open at `at`, and where they end."""
    found: list[str] = []
    current = [""]
    at += 1
    while True:
        letter = text[at]
        if letter in ",}":
            found += current
            current = [""]
            at += 1
            if letter == "}":
                return found, at
        elif letter == "{":
            inner, at = _read(text, at)
            current = [before + after for before in current for after in inner]
        else:
            end = at
            while text[end] not in _SPECIAL:
                end += 1
            current = [before + text[at:end] for before in current]
            at = end
