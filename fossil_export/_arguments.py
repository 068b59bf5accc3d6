"""What a caller of a function hands over, looked at before anything is done with it: a slip is told by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fossil_export.errors import FossilExportError

if TYPE_CHECKING:
    from typing import ParamSpec

    P = ParamSpec("P")

R = TypeVar("R")


def _path(value: Any) -> Any:
    """A path as str or Path; any other os.PathLike becomes a Path. Raises FossilExportError for what none can be."""
    if isinstance(value, (str, os.PathLike)) and "\0" in str(value):
        raise FossilExportError(f"{str(value)!a}: is no usable path: it holds a zero character")
    if isinstance(value, str):
        try:
            os.fsencode(value)
        except UnicodeEncodeError as problem:
            raise FossilExportError(f"{value!a}: is no usable path: {problem}") from problem
    if isinstance(value, (str, Path)):
        return value
    if isinstance(value, os.PathLike) and isinstance(found := os.fspath(value), str):
        return Path(found)
    if type(value).__name__ == "Origin":  # the package's own callers have found it already
        return value
    raise TypeError


def _adapter(value: Any) -> Any:
    """The same of each path in it; what else is there is for the one who opens it to tell."""
    if not isinstance(value, (list, tuple)):
        _several(value)
    return _paths(value)


def _paths(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_paths, value)) if type(value) in (list, tuple) else value
    return _path(value) if isinstance(value, os.PathLike) else value


def _several(value: Any) -> None:
    """Raise TypeError for an array without axes, which has all that several values have but the values."""
    if getattr(value, "shape", None) == ():
        raise TypeError


def _weights(value: Any) -> Any:
    _several(value)
    # Those would pass for numbers: letters of bytes, the keys of a dict; and a set has no order.
    if isinstance(value, (str, bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        raise TypeError
    return value


def _part(value: Any) -> Any:
    _several(value)
    if not isinstance(value, Collection):
        raise TypeError
    return value


def _bool(value: Any) -> Any:
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")):
        return bool(value)
    raise TypeError


def _device(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        return str(value)
    raise TypeError


def _of(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError
        return value

    return check


_WORDS: dict[Callable[[Any], Any], str] = {}


def _kind(check: Callable[[Any], Any], words: str, *names: str) -> dict[str, Callable[[Any], Any]]:
    _WORDS[check] = words
    return dict.fromkeys(names, check)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    **_kind(
        _path, "a path: str or os.PathLike",
        "artifact", "base", "base_config", "cache_dir", "folder", "graph", "onnx", "output", "prompts", "report",
    ),
    **_kind(_adapter, "an adapter, its path or its id", "adapter", "path"),
    **_kind(
        _bool, "True or False",
        "copy_data", "create_pr", "hash", "overwrite", "private", "requantize", "trust_remote_code",
    ),
    **_kind(_device, "a str such as 'cpu' or 'cuda'", "device"),
    **_kind(
        _of(str), "a str",
        "address", "commit_message", "into", "level", "mode", "repo_id", "revision", "runtime",
        "to",
    ),
    **_kind(_of(Real), "a number", "energy", "min_survival", "started"),
    **_kind(_of(Integral), "an int", "cpus", "rank"),
    **_kind(_of(Integral, str), "bytes as an int, or a str such as '5GB'", "max_disk", "max_shard_size"),
    **_kind(_weights, "a list of numbers", "weights"),
    **_kind(_part, "two numbers such as (3, 16), or names of files", "part"),
}  # fmt: skip


def _trained_on(value: Any) -> Any:
    if isinstance(value, (str, Mapping)) or type(value).__name__ == "TrainedOn":
        return value
    raise TypeError


_CHECKS |= _kind(_trained_on, "a str such as 'nf4', or a dict of a BitsAndBytesConfig's settings", "trained_on")
_MADE_BY = {
    "MergePlan": "plan_merge", "OnnxPlan": "plan_onnx", "PushPlan": "plan_push", "StreamPlan": "plan_stream",
    "Verification": "verify",
}  # fmt: skip


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function of which no argument is of a kind that it cannot be. Raises TypeError, which names the argument, what
    was given and what is expected; None is let through where it is the default."""
    parameters = signature(function).parameters

    @wraps(function)
    def called(*arguments: P.args, **options: P.kwargs) -> R:
        given = list(arguments)
        for number, (name, value) in enumerate(zip(parameters, arguments, strict=False)):
            given[number] = _checked(function.__name__, name, value, parameters[name])
        found = {
            name: _checked(function.__name__, name, value, parameters[name]) if name in parameters else value
            for name, value in options.items()
        }
        return function(*given, **found)  # type: ignore[arg-type]

    return called


def _checked(function: str, name: str, value: Any, parameter: Any) -> Any:
    if value is None and parameter.default is None:
        return value
    if (maker := _MADE_BY.get(str(parameter.annotation))) is not None:
        if type(value).__name__ != parameter.annotation:
            raise TypeError(f"{function}: {name} is {_shown(value)}, expected what {maker}() returned")
        return value
    if (check := _CHECKS.get(name)) is None:
        return value
    try:
        return check(value)
    except TypeError:
        raise TypeError(f"{function}: {name} is {_shown(value)}, expected {_WORDS[check]}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({type(value).__name__})"
