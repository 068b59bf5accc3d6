"""Model cards: the README.md of what is published."""

from fossil_export.cards._card import model_card, warnings
from fossil_export.cards._facts import Facts
from fossil_export.cards._frontmatter import BEGIN, END

__all__ = ["BEGIN", "END", "Facts", "model_card", "warnings"]
