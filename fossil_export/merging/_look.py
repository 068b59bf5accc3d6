"""A look before the hand-over: does the class load from the merged model what it loaded from the base?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fossil_export import models
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.merging._naming import denies_ties, names_in, naming_of
from fossil_export.models import Names


def look(
    adapters: Iterable[Adapter],
    base: Checkpoint,
    stored: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None,
) -> Iterator[str]:
    """What is wrong with a model of tensors `stored`, with their shapes, and this `config`, one line each.

    It is looked at as the class that the config names or, if transformers has none of that name, that was trained. If a
    shape is a new one, the installed transformers is asked for those that the class has.
    """
    config = config or {}
    shapes = {name: info.shape for name, info in base.tensors.items()}
    same = stored == shapes and config == (base.config or {})
    if same or not config.get("model_type"):
        return
    said: set[str] = set()
    for name, exact in _classes(adapters, base, config):
        before = names_in(name, base, exact)
        model = models.architecture(config, name, exact=exact)
        if before is None or model is None:
            continue
        after = Names(model, stored)
        lines = [*models.look(before, after), *_shapes(name, after, stored, shapes, config, base.config or {})]
        yield from (line for line in dict.fromkeys(lines) if line not in said)
        said.update(lines)


def _shapes(
    name: str,
    after: Names,
    stored: Mapping[str, tuple[int, ...]],
    before: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    base_config: Mapping[str, Any],
) -> Iterator[str]:
    """Tensors of a new shape that the class has in another one, and those of the old one that it now has in another.

    A tensor that is new beside one of the base's to which the class ties it has that one's shape; nobody need be asked,
    unless the config has widths of its own for the whole and its text part.
    """
    new = {parameter: one for parameter, one in after.whole.items() if stored[one] != before.get(one)}
    old = {parameter: stored[one] for parameter, one in after.whole.items() if parameter not in new}
    text = config.get("text_config")
    widths = {
        str(part["hidden_size"]) for part in (config, text) if isinstance(part, Mapping) and "hidden_size" in part
    }
    for tie in after.model.ties if len(widths) < 2 else ():
        for parameter, other in ((tie.target, tie.source), (tie.source, tie.target)):
            if parameter in new and new[parameter] not in before and old.get(other) == stored[new[parameter]]:
                del new[parameter]
    if not new:
        return
    exact = models.architecture(config, name, exact=True)
    if exact is None:
        return
    unmerged = models.architecture(base_config, name, exact=True)
    for parameter, one in after.whole.items():
        wanted = (exact.shapes or {}).get(parameter)
        is_old = stored[one] == before.get(one)
        if is_old and (unmerged is None or (unmerged.shapes or {}).get(parameter) != stored[one]):
            continue  # what did not fit before is not this merge's fault
        if wanted is not None and wanted != stored[one]:
            yield f"{one} has shape {list(stored[one])}, and {name} of that config.json has {list(wanted)}"


def _classes(adapters: Iterable[Adapter], base: Checkpoint, config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Those that the config names; if transformers has none of them, those that were trained."""
    named = config.get("architectures") or ()
    known = [(name, names) for name in named if (names := names_in(name, base, False)) is not None]
    found = [(name, denies_ties(names, base) and names_in(name, base, True) is not None) for name, names in known]
    if found:
        return found
    namings = [naming for naming in (naming_of(adapter, base) for adapter in adapters) if naming.known]
    return list(dict.fromkeys((naming.model.name, naming.model.shapes is not None) for naming in namings))
