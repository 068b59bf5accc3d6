"""What most methods have in common; a method may be an object of a class derived from `Base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import Arrays, Combination, Field, Numbers, Shapes, plain

WHOLE = 1 << 40
"""More rows than any weight has, for methods that must have all of them at once."""


class Base:
    """A method on weights (out, in), whose rows are independent, without a low-rank form.

    A class derived from it has PEFT, FIELDS, `read`, `mismatch`, `part` and `update` at least; see `Method`.
    """

    PEFT: Mapping[str, Mapping[str, str]] = {}
    STATE_DICT: Mapping[str, str] = {}
    SHARED: Mapping[str, Mapping[str, str]] = {}
    PARAMETER: str = "weight"
    COMBINES: Combination = "sum"
    EMPTY: bool = False
    FIELDS: Mapping[str, Field] = {}

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        raise NotImplementedError

    def dimensions(self, shapes: Shapes) -> int | None:
        return 2

    def beside(self, numbers: Numbers) -> str | None:
        return None

    def block_rows(self, shapes: Shapes) -> int:
        return 1

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        raise NotImplementedError

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        raise NotImplementedError

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        raise NotImplementedError

    @plain
    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        weight += self.update(weight, arrays, numbers, start)

    def form_rank(self, shapes: Shapes) -> int | None:
        return None

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        return None


def needs(shapes: Shapes, *roles: str) -> str | None:
    """Which of these roles a module lacks, for a message; None if it has all."""
    missing = [role for role in roles if role not in shapes]
    return " and ".join(missing) if missing else None
