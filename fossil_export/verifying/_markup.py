"""Values as the report writes them."""

from __future__ import annotations

import math
import re
from html import escape


def number(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{value:.3g}"


def share_text(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %" if math.isfinite(value) else "not finite"


def text(value: object) -> str:
    """Escaped, without what neither UTF-8 nor XML can hold (file names may have it)."""
    kept = str(value).encode("utf-8", "replace").decode()
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", kept))
