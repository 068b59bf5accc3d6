"""A card as the user wrote it: metadata between two lines of ---, the text, the generated part between markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._jsonfile import is_large
from fossil_export.errors import FossilExportError

BEGIN, END = "<!-- fossil-export: begin -->", "<!-- fossil-export: end -->"
NOTE = "<!-- fossil-export wrote:"
FILLER = "[More Information Needed]"
_FRONT = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)((?:[\s\S]*?(?:\r\n|\r|\n))??)---[ \t]*(?:\r\n|\n|$)")
_OPENED = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)")
MARKED = re.compile(rf"^{BEGIN}[ \t]*\r?$[\s\S]*?^{END}[ \t]*(?=\r?$)", re.MULTILINE)
_MARKER = re.compile(rf"^(?:{BEGIN}|{END})[ \t]*\r?$", re.MULTILINE)
_NOTED = re.compile(rf"^{NOTE} (.*) -->[ \t]*\r?$", re.MULTILINE)
_COMMENT = re.compile("<!--.*?-->")
_MOST = 100_000
_BITS = 14_000
# Python prints no number of more than 4,300 digits.
_LINES, _LONGEST = 50_000, 4_000_000
# The longest cards have the results of thousands of benchmarks.

_FILLED = re.compile(
    r"|# Model Card for .*|- \*\*[^*]+:\*\* \[More Information Needed\]|## Training procedure|### Framework versions"
    r"|- PEFT [\w.+]+"
)
# What PEFT adds, and fields that came and went.


def read_card(existing: str | None) -> tuple[str, str, dict[str, Any]]:
    """The YAML, the text and the metadata of a card. Raises FossilExportError with the line that is wrong."""
    import yaml  # type: ignore[import-untyped]

    given = (existing or "").removeprefix("\ufeff")
    match = _FRONT.match(given)
    if match is None and _OPENED.match(given):
        line = given[: given.index("---")].count("\n") + 1
        raise FossilExportError(
            f"README.md: line {line}: opens metadata with --- that is not closed; add a line of ---"
        )
    block, text = (match[1], given[match.end() :]) if match else ("", given)
    first = given[: match.start(1)].count("\n") + 1 if match else 1
    remedy = "correct the metadata between the two lines of ---"
    try:
        if len(block) > _LONGEST or block.count("\n") + block.count(",") > _LINES:  # which takes PyYAML minutes
            raise ValueError(f"more than {_LINES:,} lines or {_LONGEST:,} characters of metadata")
        data = yaml.safe_load(block)
        _check_size(data)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        if mark is not None and mark.index >= len(block.rstrip()):
            mark = getattr(problem, "context_mark", None) or mark  # what is never closed, not where the block ends
        position = mark.index if mark is not None else getattr(problem, "position", 0)
        why = getattr(problem, "problem", None) or getattr(problem, "reason", None) or str(problem)
        line = first + block[:position].count("\n")
        raise FossilExportError(f"README.md: line {line}: {' '.join(str(why).split())}; {remedy}") from problem
    if data is not None and not isinstance(data, dict):
        raise FossilExportError(f"README.md: line {first}: is {type(data).__name__}, expected `key: value`; {remedy}")
    markers = [found[0].strip() for found in _MARKER.finditer(text)]
    if markers not in ([], [BEGIN, END]):
        place = given.index(markers[0], match.end() if match else 0)
        line = given[:place].count("\n") + 1
        raise FossilExportError(
            f"README.md: line {line}: {BEGIN} and {END} must stand once, in this order; remove them"
        )
    return block, text, data or {}


def noted(text: str) -> dict[str, Any]:
    """What of the metadata the part between the markers says was written with it, not by the user."""
    section = MARKED.search(text)
    found = _NOTED.search(section[0]) if section is not None else None
    try:
        value = json.loads(found[1]) if found is not None else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def edited(block: str, data: Mapping[str, Any], changes: Mapping[str, Any], newline: str) -> str:
    """The YAML with `changes`, where None takes a key away; the user's lines stay as they are wherever they can."""
    import yaml
    from huggingface_hub import ModelCardData

    def dumped(found: Mapping[str, Any]) -> str:
        if not found:
            return ""
        return str(ModelCardData(**found).to_yaml(line_break=newline, original_order=list(found))) + newline

    if not changes:
        return block
    wanted = {key: value for key, value in {**data, **changes}.items() if value is not None or key not in changes}
    try:
        keys = [key for key, _ in yaml.compose(block, Loader=yaml.SafeLoader).value] if data else []
        starts = [key.start_mark.index for key in keys] + [len(block)]
        result = block[: starts[0]]
        for key, start, end in zip(keys, starts[:-1], starts[1:], strict=True):
            name, piece = str(key.value), block[start:end]
            if name in changes:
                # Comments below a value belong to the next key.
                kept = re.search(r"(?:^[ \t]*(?:#[^\n]*)?\n)*\Z", piece, re.MULTILINE)
                piece = dumped({name: changes[name]} if name in wanted else {}) + (kept[0] if kept else "")
            result += piece
        result += dumped({key: value for key, value in wanted.items() if key not in data})
        if yaml.safe_load(result) == wanted:
            return result
    except (yaml.YAMLError, ValueError):
        pass  # anchors, a mapping in braces and the like
    return str(yaml.dump(wanted, allow_unicode=True, sort_keys=False, line_break=newline))


@cache
def _template() -> tuple[frozenset[str], tuple[str, ...]]:
    """Lines of huggingface_hub's empty card, and how its comments begin, whose wording has changed over time."""
    from huggingface_hub import ModelCard

    template = Path(ModelCard.default_template_path)
    text = re.sub(r"\{\{[^{}]*?default\(\s*\"(.*?)\"[^{}]*\}\}", r"\1", template.read_text("utf-8"))
    comments = tuple(comment[:20] for comment in _COMMENT.findall(text))
    return frozenset(line.strip() for line in _COMMENT.sub("", text).splitlines()), comments


def is_template(text: str) -> bool:
    """Whether `text` is the card that PEFT and huggingface_hub write, with nothing filled in."""
    if FILLER not in text:
        return False
    lines, comments = _template()
    visible = _COMMENT.sub(lambda found: "" if found[0].startswith(comments) else found[0], text)
    return all(line in lines or _FILLED.fullmatch(line) for line in map(str.strip, visible.splitlines()))


def _check_size(data: Any) -> None:
    """Raise ValueError for metadata whose aliases stand for more than any card has."""
    if is_large(data, _MOST):
        raise ValueError(f"more than {_MOST:,} values")
    left = [data]
    while left:
        one = left.pop()
        if isinstance(one, int) and one.bit_length() > _BITS:  # written to the base of sixty, as in 9:59:59…
            raise ValueError(f"a number of more than {_BITS:,} bits")
        left += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else ()
