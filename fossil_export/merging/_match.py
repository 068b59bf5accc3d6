"""Which base tensor each trained module is.

An adapter speaks the module names of the transformers version that trained it; a checkpoint may have been
saved under other ones: without the task's prefix (`encoder.…` for `bert.encoder.…`), or as
`language_model.model.layers.…` for `model.language_model.layers.…`. The part from the numbered layer on is
the same in both, so modules are matched head by head: all modules that share a head move to one other head.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from fossil_export.errors import MergeError, listed

# Heads that name the same part of a model; adapter's and checkpoint's spelling may be either (transformers,
# conversion_mapping.py). They settle which of several heads that fit is meant.
_SYNONYMS = (
    {"model.language_model.", "language_model.model.", "model."},
    {"model.visual.", "visual."},
    {"model.vision_tower.", "vision_tower."},
    {"model.multi_modal_projector.", "multi_modal_projector."},
    {"language_model.", ""},
)

_HEAD = re.compile(r"^((?:[^.]+\.)*?)([^.]+\.\d+\..+)$")


def match_names(
    modules: Iterable[str], known: Collection[str], fits: Callable[[str, str], bool] = lambda module, name: True
) -> dict[str, str]:
    """Map each of `modules` to the module of that name or renamed head among `known`.

    `fits(module, candidate)` may veto a candidate (wrong shape). Modules without any counterpart are left
    out of the result. Raises MergeError when a head could be two different ones, or two modules would land
    on the same place.
    """
    known = set(known)
    found: dict[str, str] = {}
    by_head: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        if module in known:
            found[module] = module
        else:
            by_head[_split(module)[0]].append(module)
    for head in {_split(module)[0] for module in found}:
        by_head.pop(head, None)  # the head exists under its own name, its missing modules are missing
    heads_by_tail: dict[str, set[str]] = defaultdict(set)
    for name in known:
        for head, tail in _splits(name):
            heads_by_tail[tail].add(head)

    for head, members in by_head.items():
        tails = {module: _split(module)[1] for module in members}
        options = set.intersection(
            *(
                {option for option in heads_by_tail[tail] if fits(module, option + tail)}
                for module, tail in tails.items()
            )
        )
        if len(options) > 1:
            options = {option for option in options if _same_part(head, option)} or options
        if len(options) > 1:
            options = _nearest(head + tails[members[0]], tails[members[0]], options)
        if len(options) > 1:
            places = sorted(option + tails[members[0]] for option in options)
            raise MergeError(
                f"module {members[0]} could be {listed(places)} in the base; the adapter belongs to a model "
                "with other names, name the base it was trained on with --base"
            )
        for option in options:
            found.update({module: option + tail for module, tail in tails.items()})
    _refuse_collisions(found)
    return found


def _split(name: str) -> tuple[str, str]:
    """Head and tail: the tail begins at the list that numbers the layers, or is the last component."""
    match = _HEAD.match(name)
    if match:
        return match[1], match[2]
    head, dot, last = name.rpartition(".")
    return head + dot, last


def _splits(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return [("".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts))]


def _same_part(first: str, second: str) -> bool:
    """Whether two heads differ only by a known respelling of their beginning."""
    return any(
        first.startswith(a) and second.startswith(b) and first[len(a) :] == second[len(b) :]
        for group in _SYNONYMS
        for a in group
        for b in group
        if a != b
    )


def _nearest(module: str, tail: str, heads: set[str]) -> set[str]:
    """The heads that share the longest end with the module's name: `pooler.dense` for `bert.pooler.dense`."""

    def shared(head: str) -> int:
        pairs = zip(reversed(module.split(".")), reversed((head + tail).split(".")), strict=False)
        return next((count for count, (one, other) in enumerate(pairs) if one != other), len((head + tail).split(".")))

    longest = max(map(shared, heads))
    return {head for head in heads if shared(head) == longest}


def _refuse_collisions(found: dict[str, str]) -> None:
    taken: dict[str, str] = {}
    for module, name in found.items():
        if name in taken:
            raise MergeError(
                f"modules {taken[name]} and {module} both match {name} in the base; "
                "name the base they were trained on with --base"
            )
        taken[name] = module
