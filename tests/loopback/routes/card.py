"""The metadata of a model card."""

from __future__ import annotations

import re
from typing import Any

import yaml


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    card = yaml.safe_load(match[1]) if match else {}
    if not isinstance(card or {}, dict):
        raise ValueError("The metadata of a card must be a mapping")
    return card or {}
