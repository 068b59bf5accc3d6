"""The levels of `verify`."""

from __future__ import annotations

from typing import Literal, get_args

Level = Literal["weights", "forward", "all"]
LEVELS: tuple[Level, ...] = get_args(Level)
