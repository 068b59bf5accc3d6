"""What the user should know about a merge that is possible all the same."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.errors import listed
from fossil_export.merging._brought import Brought
from fossil_export.merging._naming import Naming, exact_names


def warnings_of(adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought) -> Iterator[str]:
    yield from _incomplete(adapter, base, naming, brought)
    yield from _headless(base, naming, brought)
    yield from _bypassed(brought)
    yield from _untold(base, naming, brought)


def _bypassed(brought: Brought) -> Iterator[str]:
    """Shards that did nothing while they were trained."""
    if brought.idle:
        yield (
            f"{listed(brought.idle)}: this model computes with the weights of these layers and never calls them, so "
            "their shards did nothing in training; they are left out, as the trained model has them"
        )


def _incomplete(adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought) -> Iterator[str]:
    """Modules that the config targets but that have no shard, beside others that do: the file may be incomplete."""
    targets = adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    if not isinstance(targets, list) or narrowed:
        return
    placed = {parameter.removesuffix(".weight") for parameter in [*brought.trained, *brought.saved]} | {*brought.idle}
    heads = tuple({_up_to_number(module) for module in placed})
    modules = (
        parameter.removesuffix(".weight")
        for parameter, name in naming.names.whole.items()
        if parameter.endswith(".weight") and len(base.tensors[name].shape) == 2
    )
    bare = [
        module
        for module in modules
        if module not in placed and module.startswith(heads)
        if any(f".{module}".endswith(f".{target}") for target in targets)
    ]
    if bare:
        yield f"target_modules covers {listed(bare)}, but the adapter has no shard for that; is it complete?"


def _headless(base: Checkpoint, naming: Naming, brought: Brought) -> Iterator[str]:
    """A head that the config's class has and the base lacks: loading makes random numbers of it."""
    if not naming.known or naming.model.head is None or not naming.is_named_by(base.config):
        return
    weight = f"{naming.model.head}.weight"
    tied = any(tie.on and weight in (tie.target, tie.source) for tie in naming.model.ties)
    if not tied and weight not in naming.names and weight not in brought and naming.model.has(weight):
        yield (
            f"{base.location}: has no {weight}, which {naming.model.name} of its config.json has and nothing ties; "
            "whoever loads the model gets random numbers there"
        )


def _untold(base: Checkpoint, naming: Naming, brought: Brought) -> Iterator[str]:
    """Parameters of a class that the config does not name, which neither the base nor the adapter has: the trainer made
    random numbers of them, and PEFT did not save these."""
    if not naming.known or naming.is_named_by(base.config) or all(one in naming.names for one in brought.saved):
        return
    exact = exact_names(naming.model.name, base)
    if exact is None:
        return
    given = [*brought.saved, *exact.whole, *exact.converted]
    tied = {one for tie in exact.model.ties if tie.on for one in (tie.target, tie.source)}
    lost = [
        parameter
        for parameter in exact.model.shapes or ()
        if parameter not in given and parameter not in tied
        if not any(re.search(pattern, parameter) for pattern in exact.model.optional)
    ]
    if lost:
        yield (
            f"{base.location}: has no {listed(lost)}, nor has the adapter, so that {naming.model.name} was trained "
            "with random numbers there, which are lost; train again with that in modules_to_save"
        )


def _up_to_number(module: str) -> str:
    """What comes before the number of the layer."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number])
