"""What can be merged into a base whose quantization is not read: what it has as plain floats, while the rest of it is
copied."""

from __future__ import annotations

from bisect import bisect_left

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints.quantized import Unread, unread
from fossil_export.errors import MergeError, listed

_UNKNOWN = (
    "the base is quantized in a way that is not known, and shards are merged into floats; save its weights as floats "
    "with the library that quantized it, and merge into that (the model before its quantization is another one than "
    "an adapter for this was trained on)"
)


def quantization(base: Checkpoint) -> str | None:
    """That it is quantized, how, and what to do; None if nothing says so."""
    found = _found(base)
    return found.reason if found is not None else None


def quantized(base: Checkpoint) -> str:
    """Why nothing can be merged into a weight that is no float, and what to do."""
    return quantization(base) or _UNKNOWN


def quantized_with(name: str, base: Checkpoint, *, hidden: bool = True) -> str | None:
    """Why nothing can be merged into a tensor that looks like floats: others beside it (scales, say) change what it
    means, or (`hidden`) it may be quantized when the model runs."""
    found = _found(base)
    if found is None:
        return None
    if found.hidden and hidden:
        return f"may be quantized when the model runs: {found.reason}"
    module = name.removesuffix("weight") if name.endswith(".weight") else name
    beside = [one.removeprefix(module) for one in _beginning(module, base) if one != name]
    beside = [one for one in beside if one not in ("bias", "_bias")]
    return f"has {listed(beside)} beside it: {found.reason}" if beside else None


def refuse_parts(name: str, dtype: str, base: Checkpoint) -> None:
    """Raise MergeError if a tensor of this dtype is quantized, so that no part of it can have other values."""
    if dtype not in FLOATS:
        raise MergeError(f"{base.location}: {name} is stored as {dtype}: {quantized(base)}")
    if reason := quantized_with(name, base, hidden=False):
        raise MergeError(f"{base.location}: {name} {reason}")


def refuse_casting(base: Checkpoint, dtype: str) -> None:
    """Raise MergeError if a base whose quantization is not read should get another dtype: its scales would."""
    if dtype != "auto" and (found := _found(base)) is not None:
        raise MergeError(f"{base.location}: dtype cannot be {dtype}: {found.reason}")


def _found(base: Checkpoint) -> Unread | None:
    if "unread" not in base.found:
        floats = all(info.dtype in FLOATS for info in base.tensors.values())
        base.found["unread"] = unread(base.config, () if floats else base.tensors)
    found: Unread | None = base.found["unread"]
    return found


def _beginning(start: str, base: Checkpoint) -> list[str]:
    """The base's tensors whose names begin so."""
    if "sorted" not in base.found:
        base.found["sorted"] = sorted(base.tensors)
    names: list[str] = base.found["sorted"]
    first = bisect_left(names, start)
    last = first
    while last < len(names) and names[last].startswith(start):
        last += 1
    return names[first:last]
