"""What a model card says of one kind of artifact, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fossil_export.cards._facts import Facts


@dataclass(frozen=True)
class Sources:
    """From what the artifact was made, as Markdown."""

    base: str
    adapter: str
    method: str


@dataclass(frozen=True)
class KindCard:
    """`summary` is the first sentence, `usage` the blocks on how it is used, and `made` rows of the table on how it was
    made. `library` is the metadata's library_name, `relation` its base_model_relation, `tags` are tags beside those of
    all. `is_the_adapter`: it is the trained adapter itself, of which another one need not be named."""

    summary: Callable[[Facts, Sources], str]
    usage: Callable[[Facts], Iterator[str]]
    made: Callable[[Facts], Iterable[tuple[str, Any]]] = lambda facts: ()
    library: Callable[[Facts], str | None] = lambda facts: None
    relation: Callable[[Facts], str] = lambda facts: "finetune"
    tags: Callable[[Facts], list[str]] = lambda facts: []
    is_the_adapter: bool = False
