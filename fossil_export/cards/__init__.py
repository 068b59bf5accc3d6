"""Model cards: the README.md of what is published."""

from fossil_export.cards.card import model_card, warnings
from fossil_export.cards.facts import Facts
from fossil_export.cards.frontmatter import BEGIN, END

__all__ = ["BEGIN", "END", "Facts", "model_card", "warnings"]
