"""A look at a model that was made from another one: does its class load from it what it loaded from that?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fossil_export.models._inventory import Names


def look(before: Names, after: Names) -> Iterator[str]:
    """What is wrong with the names of the made model, one line each.

    Both are of one class, each with the config beside it, which decides what is tied. What the first lacks already, or
    has too much, is not the second's fault.
    """
    name = after.model.name
    for parameter in [*before.whole, *before.converted]:
        if not after.holds(parameter):
            yield f"{parameter} is missing, which {name} would make of random numbers"
    known = {*before.strangers, *before.twice}
    for stored in after.strangers:
        if stored not in known and not any(re.search(pattern, stored) for pattern in after.model.ignored):
            yield f"{stored} is stored, which {name} does not load"
    for stored in after.twice:
        if stored not in known:
            yield f"{stored} is stored beside another spelling of itself, and {name} loads one of the two"
    was = {(tie.target, tie.source) for tie in before.model.ties if tie.on}
    for tie in after.model.ties:
        if tie.on or (tie.target, tie.source) not in was:
            continue
        pair = (tie.target, tie.source)
        if any(one in after for one in pair):
            for parameter in pair:
                if parameter not in after and after.model.has(parameter):
                    yield (
                        f"{parameter} is missing, which config.json unties from the others; {name} would make it of "
                        "random numbers"
                    )
