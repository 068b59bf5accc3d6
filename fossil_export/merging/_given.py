"""The adapters of a merge as they are given: one or several, each by itself or with its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.errors import MergeError

Given = Adapter | str | Path
"""An adapter: itself, its path or its id on the Hub."""

Weighted = tuple[Given, float]
"""One with the weight at which its updates are added."""

AnyGiven = Given | Weighted | Sequence[Given | Weighted]
"""What `merge` and `verify` take."""


def listed_given(given: AnyGiven) -> list[Given | Weighted]:
    """What was given as a list; a pair of an adapter and a number is one adapter."""
    if isinstance(given, (Adapter, str, Path)):
        return [given]
    if isinstance(given, tuple) and _is_pair(given):
        return [(given[0], given[1])]
    if isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        return list(given)  # type: ignore[arg-type]
    return [given]  # whoever opens it says what is wrong


def with_weights(
    given: AnyGiven, weights: Sequence[float] | None = None
) -> tuple[tuple[Given, ...], tuple[float | None, ...]]:
    """The adapters, and the weight of each; None for one that was given without.

    Raises MergeError for weights that are no finite numbers, too few or too many, or given in both ways.
    """
    entries = listed_given(given)
    if not entries:
        raise MergeError("there is no adapter to merge; name one")
    pairs: list[tuple[Any, Any]] = [one if _is_pair(one) else (one, None) for one in entries]  # type: ignore[misc]
    found = [weight for _, weight in pairs]
    if weights is not None:
        if any(weight is not None for weight in found):
            raise MergeError("weights are given both with the adapters and as weights=; give them once")
        found = list(weights)
    numbers = [_number(weight) if weight is not None or weights is not None else None for weight in found]
    if len(numbers) != len(pairs) or any(number is not None and not math.isfinite(number) for number in numbers):
        raise MergeError(f"weights are {found}, expected a finite number for each of {len(pairs)} adapters")
    return tuple(adapter for adapter, _ in pairs), tuple(numbers)


def loaded(given: AnyGiven, weights: Sequence[float] | None = None) -> tuple[tuple[Adapter, ...], tuple[float, ...]]:
    """The adapters, opened, and the weight of each, 1 for one that was given without. Raises MergeError as
    `with_weights` does, and what `load_adapter` raises."""
    names, numbers = with_weights(given, weights)
    adapters = tuple(one if isinstance(one, Adapter) else load_adapter(one) for one in names)
    return adapters, tuple(1.0 if number is None else number for number in numbers)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], (Adapter, str, Path))


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) or hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan
