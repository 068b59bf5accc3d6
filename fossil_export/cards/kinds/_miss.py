"""The card of the trained adapter itself."""

from __future__ import annotations

from fossil_export.cards._facts import Facts
from fossil_export.cards.kinds._kind_card import KindCard, Sources
from fossil_export.cards.kinds._transformers import with_peft


def _summary(facts: Facts, told: Sources) -> str:
    return f"{told.adapter} for {told.base}, trained with {told.method}, as PEFT loads it."


CARD = KindCard(
    summary=_summary,
    usage=with_peft,
    library=lambda facts: "peft",
    relation=lambda facts: "adapter",
    is_the_adapter=True,
)
