"""What the cards of LoRAs say alike, whatever program loads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fossil_export.cards._facts import Facts, part
from fossil_export.cards._markdown import number, plain
from fossil_export.cards.kinds._kind_card import Sources


def summary(told: Sources, form: str) -> str:
    """`form` is what it is to the adapter that was trained."""
    return f"{told.adapter} for {told.base}, trained with {told.method}, as {form}."


def as_lora(facts: Facts, told: Sources) -> str:
    """The first sentence on an adapter that is a LoRA exactly, be it one already."""
    if part(facts.record, "adapter").get("peft_type") == "LORA":
        return f"{told.adapter} for {told.base}, trained with {told.method}."
    return summary(told, "the LoRA that it is")


def made(facts: Facts) -> Iterator[tuple[str, Any]]:
    """Rows on the conversion."""
    details = part(facts.record, facts.kind)
    if details.get("rank") != part(facts.record, "adapter").get("rank"):
        yield "Rank of the LoRA", plain(details.get("rank") or "")
    yield "Numbers", plain(details.get("outtype") or "")
    error = details.get("relative_error")
    yield "Error of the conversion", f"{number(error, '.2g')} of the update" if error else None
