"""Small JSON files of a model folder, read within bounds, with errors that say which file and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.errors import FossilExportError, unreadable

if TYPE_CHECKING:
    from fossil_export.checkpoints._folder import Folder

MAX_BYTES = 100_000_000
"""Of a JSON file; the index of a model with 90,000 tensors has some ten million."""

MAX_PARTS = 3_000_000
"""Commas and brackets; each part takes up to a hundred bytes when it is read."""

CONFIG_PARTS = 300_000
"""The same of a config, of which transformers makes several copies."""

Pairs = list[tuple[str, Any]]


class TooManyPartsError(ValueError):
    """JSON that is not read, whether it is sound or not."""


_CONFIGS = ("config.json", "adapter_config.json")


def read_json(path: Path, error: type[FossilExportError]) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` when it cannot be read, is not JSON or not an object."""
    try:
        if path.exists() and not path.is_file():  # a pipe would let us wait
            raise error(f"{path}: is no regular file; put the file itself in its place")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(unreadable(path, problem)) from problem
    return parse_json(text, path, error)


def json_in(home: Folder, name: str, error: type[FossilExportError]) -> dict[str, Any]:
    """The same of a file of a folder, here or elsewhere."""
    path = home.path / name
    try:
        if home.size(name) > MAX_BYTES:
            raise _too_large(path, error)
        text = home.read(name)
    except OSError as problem:
        raise error(unreadable(path, problem)) from problem
    return parse_json(text, path, error)


def parse_json(text: bytes, path: Path, error: type[FossilExportError]) -> dict[str, Any]:
    """The JSON object that `text`, the content of `path`, is; raises `error`."""
    if len(text) > MAX_BYTES:
        raise _too_large(path, error)
    try:
        value = load_json(text, at_most=CONFIG_PARTS if path.name in _CONFIGS else MAX_PARTS)
    except TooManyPartsError as problem:
        raise error(f"{path}: has {problem}; it is too large for its kind, fetch or save it again") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not valid JSON ({problem}); fetch or save it again") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds {type(value).__name__}, not a JSON object; fetch or save it again")
    return value


def load_json(text: bytes, pairs: Callable[[Pairs], Any] | None = None, at_most: int = MAX_PARTS) -> Any:
    """JSON in UTF-8, as the libraries read it: in no other encoding, without a mark of bytes at its beginning. Raises
    ValueError or RecursionError."""
    parts = sum(text.count(one) for one in (b",", b"[", b"{"))
    if parts > at_most:
        raise TooManyPartsError(f"{parts:,} parts (values and brackets), of which at most {at_most:,} are read")
    return json.loads(text.decode(), object_pairs_hook=pairs)


def is_large(value: Any, most: int) -> bool:
    """Whether there are more than `most` values in `value`; of YAML, aliases count each time."""
    left, count = [value], 0
    while left and count <= most:
        one = left.pop()
        count += 1
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return count > most


def write_json(value: dict[str, Any]) -> bytes:
    """`value` as transformers writes its configs: two spaces of indent, a newline at the end."""
    return (dumped(value, indent=2) + "\n").encode()


def dumped(value: Any, **options: Any) -> str:
    """`value` as JSON that can be encoded: half a character (a lone surrogate), which no UTF-8 has, stays as the escape
    that it came from."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def _too_large(path: Path, error: type[FossilExportError]) -> FossilExportError:
    return error(f"{path}: has more than {MAX_BYTES:,} bytes, too many for its kind; fetch or save it again")
