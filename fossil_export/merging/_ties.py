"""Parameters that are one tensor while they are tied, and several once training parted them.

PEFT trains a copy of each module of modules_to_save, and a shard beside each targeted one, whatever is tied to it: from
then on the live model has parameters of their own. A checkpoint can say so if it stores each of them and its config
unties them; that unties all that hang on the same field, so all of these are stored. (PEFT's own merge adds the shard
of a targeted tied head to the embedding as well, and so does not give the model that was trained.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import read_rows
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import MergeError, listed
from fossil_export.merging._brought import Brought
from fossil_export.merging._naming import Naming
from fossil_export.merging._placement import Pair, Placement
from fossil_export.merging._rows import follow, refuse_unfollowed, rows_differ
from fossil_export.methods import starts_elsewhere
from fossil_export.models import Tie

_AT_ONCE = 1 << 25
"""Bytes of each of two tensors that are compared."""


@dataclass(frozen=True)
class Group:
    """Parameters that are one while they are tied; the first is the one the others follow."""

    members: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...]


def groups(naming: Naming, brought: Brought) -> tuple[Group, ...]:
    """What is tied in the trained class under the base's config."""
    members: dict[str, list[str]] = {}
    fields: dict[str, set[tuple[str, ...]]] = {}
    known = list(
        dict.fromkeys([*naming.names.whole, *naming.names.converted, *brought.saved, *brought.trained, *brought.rows])
    )
    leader: dict[str, str] = {}
    for tie in naming.model.ties:
        if not tie.on:
            continue
        for target, source in _pairs(tie, known, brought, naming):
            first = leader.get(source, source)
            leader[target] = first
            group = members.setdefault(first, [first])
            group += [target] if target not in group else []
            fields.setdefault(first, set()).update((tie.field, *tie.also))
    return tuple(Group(tuple(group), tuple(sorted(fields[first]))) for first, group in members.items())


def _pairs(tie: Tie, known: Iterable[str], brought: Brought, naming: Naming) -> Iterator[tuple[str, str]]:
    """Target and source by name. Raises MergeError for a pattern that names a parameter of the adapter."""
    if naming.model.has(tie.target):
        yield tie.target, tie.source
        return
    if tie.is_literal:
        for name in known:
            for own, other in ((tie.target, tie.source), (tie.source, tie.target)):
                if name.startswith(f"{own}."):
                    pair = name, other + name[len(own) :]
                    yield pair if own == tie.target else pair[::-1]
        return
    for name in known:
        if name in brought and (re.match(tie.target, name) or re.match(tie.source, name)):
            raise MergeError(
                f"{name} is tied to others ({tie.target} to {tie.source}), of which training changed one alone; a "
                "checkpoint of this class cannot hold that"
            )


def part(naming: Naming, adapter: Adapter, base: Checkpoint, brought: Brought, placement: Placement) -> dict[str, str]:
    """Settle what the base ties: which of what was `brought` is stored, and which parameters are copied, by the one
    whose stored tensor they are copied from.

    Reads `placement.tied`; sets `placement.untie` and `placement.undecided`. Raises MergeError for what a checkpoint of
    this class cannot express.
    """
    found = groups(naming, brought)
    if adapter.keeps_ties:
        _refuse_copies(found, naming, base, brought)
        return {}
    parted: list[Group] = []
    refuse_unfollowed(found, naming, adapter, brought)
    for group in found:
        follow(group, naming, adapter, base, brought, placement)
        if any(member in brought for member in group.members) and _differ(group, naming, base, brought, placement):
            parted.append(group)
    fields = {one for group in parted for one in group.fields}
    if not fields:
        return {}
    where = f"{base.location}: {naming.model.name}"
    names = next(f"{group.members[0]} and {group.members[1]}" for group in parted)
    # Of undecided ones this is asked again once they are known to differ.
    if () in fields and not placement.undecided:
        raise MergeError(
            f"{where} ties {names} whatever its config says, and training parted them; such a model cannot be stored "
            "as a plain checkpoint"
        )
    if naming.model.follows_tie and not placement.undecided:
        raise MergeError(
            f"{where} computes otherwise while {names} are tied, which this training parted; such a model cannot be "
            "stored as a plain checkpoint"
        )
    for tie in naming.model.unsure:
        if fields & {tie.field, *tie.also}:
            raise MergeError(
                f"{where} ties other parameters by the field that ties {names} ({tie.target}), and only transformers "
                "knows which; install it (pip install transformers)"
            )
    placement.untie = tuple(sorted(fields - {()}))
    copied: dict[str, str] = {}
    for group in found:
        if not fields & set(group.fields):
            continue
        stored = [member for member in group.members if member in naming.names]
        for member in group.members:
            if member in naming.names or member in brought.saved:
                continue
            if not stored:
                raise MergeError(
                    f"{where} ties {group.members[0]} and {group.members[1]}, and neither the base nor the adapter has "
                    "one of them; name a base that was saved as this class, or train again with them in modules_to_save"
                )
            if stored[0] in brought.saved and group not in parted:
                brought.saved[member] = brought.saved[stored[0]]
            else:
                copied[member] = stored[0]
    return copied


def _refuse_copies(found: Iterable[Group], naming: Naming, base: Checkpoint, brought: Brought) -> None:
    """Raise MergeError if the base stores a tied tensor twice, of which one alone would change."""
    for group in found:
        stored = [member for member in group.members if member in naming.names]
        if len(stored) > 1 and any(member in brought for member in group.members):
            raise MergeError(
                f"{base.location}: stores {stored[0]} and {stored[1]}, which are one tensor in training; save the base "
                "again with transformers, which stores it once"
            )


def _differ(group: Group, naming: Naming, base: Checkpoint, brought: Brought, placement: Placement) -> bool:
    """Whether the members of a group are not one tensor any more. If they still are, what was brought for members that
    are not stored is taken out of `brought`."""
    stored = [member for member in group.members if member in naming.names]
    trained = [member for member in group.members if member in brought.trained]
    own = {
        member: _stored(member if member in stored else stored[0], naming, base) for member in group.members if stored
    }
    begun = [member for member in trained if starts_elsewhere(brought.trained[member].method)]
    if begun and not any(member in brought.below for member in begun):
        raise MergeError(
            f"{base.location}: {begun[0]} is tied to {listed([one for one in group.members if one != begun[0]])}, and "
            "training began from another weight, which PEFT gave all of them and did not save; convert the adapter "
            "with PEFT where it was trained (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for member in [one for one in group.members if one in brought.below]:
        # What lies below is the tied tensor itself, which was resized, or from which training began.
        below = brought.below[member]
        for other in group.members:
            old = own.get(other)
            if other not in brought.saved and (begun or old is None or old.shape != below.shape):
                brought.saved[other] = below
    if trained or rows_differ(group, brought):
        return True
    values = {member: brought.saved.get(member) or own.get(member) for member in group.members}
    distinct: dict[TensorInfo, str] = {}
    for member, info in sorted(values.items(), key=lambda value: value[0] not in brought.saved):
        if info is not None:
            distinct.setdefault(info, member)
    same = len(distinct) == 1
    alike = len({(info.dtype, info.shape) for info in distinct}) == 1
    if not same and alike and any(member in brought.saved for member in group.members[1:]):
        if placement.tied is None:
            (one, first), *others = distinct.items()
            placement.undecided += tuple(
                Pair((_home(first, naming), _home(second, naming)), (one, other)) for other, second in others
            )
        same = bool(placement.tied)
    if same and stored:
        for member in group.members:
            if member not in stored:
                brought.saved.pop(member, None)
    return not same


def are_equal(adapter: Adapter, base: Checkpoint, placement: Placement) -> bool | None:
    """Whether the tensors that are `undecided` are one, byte for byte; None if there are none.

    Reads all of them, `_AT_ONCE` bytes at a time.
    """
    for one, other in (pair.tensors for pair in placement.undecided):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        size = max(1, one.nbytes // max(1, one.shape[0]))
        rows = max(1, _AT_ONCE // size)
        for at in range(0, one.shape[0], rows):
            stop = min(one.shape[0], at + rows)
            first, second = (_values(info, at, stop, adapter, base) for info in (one, other))
            if first != second:
                return False
    return True if placement.undecided else None


def _values(info: TensorInfo, start: int, stop: int, adapter: Adapter, base: Checkpoint) -> bytes:
    if base.tensors.get(info.name) is not info:
        return adapter.array(info, start, stop).tobytes()
    found: bytes = read_rows(info, start, stop, partial(view_rows, base.home))[:].tobytes()
    return found


def _home(parameter: str, naming: Naming) -> str:
    return naming.names.whole.get(parameter) or naming.names.spelling(parameter) or parameter


def _stored(parameter: str, naming: Naming, base: Checkpoint) -> TensorInfo | None:
    name = naming.names.whole.get(parameter)
    return base.tensors[name] if name is not None else None
