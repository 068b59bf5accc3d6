"""Small JSON files of a model folder, read with errors that say which file and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fossil_export.errors import FossilExportError


def read_json(path: Path, error: type[FossilExportError]) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` when it cannot be read, is not JSON or not an object."""
    try:
        text = path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    return parse_json(text, path, error)


def parse_json(text: bytes, path: Path, error: type[FossilExportError]) -> dict[str, Any]:
    """The JSON object that `text`, the content of `path`, is; raises `error`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not valid JSON ({problem}); fetch or save it again") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds {type(value).__name__}, not a JSON object; fetch or save it again")
    return value


def write_json(value: dict[str, Any]) -> bytes:
    """`value` as transformers writes its configs: two spaces of indent, a newline at the end."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a character, which JSON can hold and UTF-8 cannot
        return (json.dumps(value, indent=2) + "\n").encode()
