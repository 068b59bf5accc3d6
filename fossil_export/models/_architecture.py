"""What a model class of transformers is, as data: its parameters, how files name them, what is tied.

It comes from the installed transformers (`_transformers`) or from the table that was made out of it (`_table`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"[\w.]+")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Operation:
    """One step of a conversion: the name of its class in transformers/core_model_loading.py, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How names in files become names in the model, and back (transformers' WeightTransform).

    `kind` is the name of its class there. `sources` and `targets` are its patterns as transformers prepared them for
    loading, `back` those for saving (sources, then targets); `operations` are a WeightConverter's, for loading. With a
    `scope` it sees only names below that module, `root` being the prefix of the base model that these may lack.
    """

    kind: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    back: tuple[tuple[str, ...], tuple[str, ...]]
    operations: tuple[Operation, ...] = ()
    offset: int = 0
    scope: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class Tie:
    """Parameters (by name or by pattern) `target` are `source`, if `on`.

    `field` is the config's key, or path of keys, that switches it: ("text_config", "tie_word_embeddings"); () if no key
    does. It is off only if the keys in `also` are false, too: some configs copy their text part's.
    """

    target: str
    source: str
    on: bool
    field: tuple[str, ...] = ("tie_word_embeddings",)
    also: tuple[tuple[str, ...], ...] = ()

    @property
    def is_literal(self) -> bool:
        """Whether both are names, of parameters or of modules with all that is in them."""
        return bool(_NAME.fullmatch(self.target) and _NAME.fullmatch(self.source))


@dataclass(frozen=True)
class Architecture:
    """A model class for one config.

    `shapes` are its parameters and persistent buffers by name, with their shapes; None if only their `patterns` are
    known: names whose numbers are `*`, of the default config and of others. `prefix` is the name by which its family
    has the base model, which need not be in this class. `parts` are the models inside it, by module name: the config's
    key for each, and its class. `embedding` and `head` are modules; `follows_tie` says that it computes in another way
    if its embeddings are tied. `ignored` are patterns of names that it passes over in files, `optional` those it may do
    without.
    """

    name: str
    model_type: str
    patterns: frozenset[str]
    prefix: str = ""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    rules: tuple[Rule, ...] = ()
    ties: tuple[Tie, ...] = ()
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    follows_tie: bool = False
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Architecture {self.name}: {len(self.patterns)} parameters by kind, {len(self.rules)} rules>"

    @property
    def unsure(self) -> tuple[Tie, ...]:
        """Ties that are patterns, or whose numbers belong to the default config: only `shapes` tell what they tie."""
        if self.shapes is not None:
            return ()
        return tuple(
            tie for tie in self.ties if tie.on and not (tie.is_literal and pattern_of(tie.target) == tie.target)
        )

    def has(self, name: str) -> bool:
        """Whether the class has a parameter or buffer of this name (by its pattern, if shapes are not known)."""
        return name in self.shapes if self.shapes is not None else pattern_of(name) in self.patterns


def pattern_of(name: str) -> str:
    """A name with `*` for every number in it: `layers.*.mlp.weight` for `layers.3.mlp.weight`."""
    return _NUMBER.sub("*", name)
