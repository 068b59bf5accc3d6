"""What adapters change in the base, before it is laid out in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.errors import MergeError, listed
from fossil_export.merging._change import Change, Piece
from fossil_export.methods import METHODS


@dataclass(frozen=True)
class Pair:
    """Two tensors that only their values tell apart, and the names they would be stored by."""

    names: tuple[str, str]
    tensors: tuple[TensorInfo, TensorInfo]


@dataclass
class Placement:
    """What one adapter changes, by the name of the tensor in the base; filled step by step while the plan is made.

    `saved` replaces a tensor by one of the adapter's (or by a slice of one, see `slice_of`), `pieces` replace parts of
    a tensor by such, `copied` makes a tensor from another one of the base's, `trained` adds an update to a weight,
    which lies in a matrix (`into`), `added` names tensors that the base does not have. `labels` is the number of
    outputs of a classifier that came with the adapter. `undecided` are pairs of tensors that the base ties, of which
    only their values tell whether training parted them; `tied` says so once it is known. `untie` are the config's
    fields that must be false, by their keys, and `architecture` is the class that has what was added, if the base's has
    not.
    """

    saved: dict[str, TensorInfo] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    copied: dict[str, TensorInfo] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)
    into: dict[str, Matrix] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    untie: tuple[tuple[str, ...], ...] = ()
    vocab_size: int | None = None
    labels: int | None = None
    architecture: str | None = None
    warnings: tuple[str, ...] = ()
    tied: bool | None = None
    undecided: tuple[Pair, ...] = ()

    def source(self, name: str, own: TensorInfo | None) -> TensorInfo:
        """Where tensor `name` comes from; `own` is the base's tensor of that name, if it has one."""
        source = self.saved.get(name) or self.copied.get(name) or own
        assert source is not None, name
        return source


@dataclass(frozen=True)
class Places:
    """What all adapters of a plan change, by the name of the tensor in the base.

    `sources` are the tensors that take the place of the base's, with the number of the adapter they come with (None for
    another one of the base's); `pieces` take that of parts. `task_type` is that of the adapter whose classifier has
    `labels` outputs; `undecided` is by adapter (see `Placement`).
    """

    changes: Mapping[str, tuple[Change, ...]]
    sources: Mapping[str, tuple[TensorInfo, int | None]]
    pieces: Mapping[str, tuple[Piece, ...]]
    added: tuple[str, ...]
    untie: tuple[tuple[str, ...], ...]
    vocab_size: int | None
    labels: int | None
    task_type: str | None
    architecture: str | None
    warnings: tuple[str, ...]
    undecided: tuple[tuple[str, str] | None, ...]


def together(adapters: Sequence[Adapter], placements: Sequence[Placement], weights: Sequence[float]) -> Places:
    """Put together what adapters, each placed by itself, change in one base. Raises MergeError if two want the same
    tensor in ways that cannot be added up."""
    changes: dict[str, tuple[Change, ...]] = {}
    # A tensor that one adapter brings goes before the copy of the base's that another one would store there.
    sources: dict[str, tuple[TensorInfo, int | None]] = {
        name: (info, None) for placement in placements for name, info in placement.copied.items()
    }
    pieces: dict[str, tuple[Piece, ...]] = {}
    for number, (adapter, placement, weight) in enumerate(zip(adapters, placements, weights, strict=True)):
        if (placement.saved or placement.pieces) and weight != 1.0:
            whole = [*sorted(placement.saved), *(one.source.name for own in placement.pieces.values() for one in own)]
            raise MergeError(
                f"{adapter.path}: holds whole trained tensors ({listed(whole)}), which replace the "
                f"base's and cannot be taken {weight:g} times; {_SAVED_BY_PEFT if _is_by_peft(placement) else ''}leave "
                "its weight at 1"
            )
        by_weight = [one for one in placement.trained.values() if METHODS[one.method].COMBINES != "sum"]
        if by_weight and weight != 1.0:
            raise MergeError(
                f"{adapter.path}: its updates ({by_weight[0].method}) depend on the weights, and cannot be taken "
                f"{weight:g} times; leave its weight at 1"
            )
        for name, info in placement.saved.items():
            sources[name] = (info, number)
        for name, own in placement.pieces.items():
            pieces[name] = (*pieces.get(name, ()), *(replace(piece, adapter=number) for piece in own))
        for name, trained in placement.trained.items():
            change = Change(number, trained, placement.into[name], weight)
            tensor = name if name in placement.saved or name in placement.copied else change.into.stored[0].name
            changes[tensor] = (*changes.get(tensor, ()), change)
    _refuse_conflicts(adapters, placements)
    _refuse_lone(adapters, changes)
    for name in [*pieces, *(name for name, found in changes.items() if len(found) > 1 and name not in pieces)]:
        owner = sources.get(name, (None, None))[1]
        _refuse_overlaps(name, changes.get(name, ()), pieces.get(name, ()), owner, adapters)
    sizes = {placement.vocab_size: adapter for adapter, placement in zip(adapters, placements, strict=True)}
    sizes.pop(None, None)
    if len(sizes) > 1:
        found = listed([f"{adapter.path}: {rows}" for rows, adapter in sizes.items()])
        raise MergeError(f"the adapters resized the vocabulary to different sizes ({found}); merge one of them")
    heads = [(placement.labels, one) for one, placement in zip(adapters, placements, strict=True) if placement.labels]
    labels, classifier = heads[0] if heads else (None, None)
    return Places(
        changes=changes,
        sources=sources,
        pieces=pieces,
        added=tuple(dict.fromkeys(name for placement in placements for name in placement.added)),
        untie=tuple(dict.fromkeys(one for placement in placements for one in placement.untie)),
        vocab_size=next(iter(sizes), None),
        labels=labels,
        task_type=classifier.config.get("task_type") if classifier is not None else None,
        architecture=next((placement.architecture for placement in placements if placement.architecture), None),
        warnings=tuple(dict.fromkeys(line for placement in placements for line in placement.warnings)),
        undecided=tuple(placement.undecided[0].names if placement.undecided else None for placement in placements),
    )


_SAVED_BY_PEFT = "save the adapter without what PEFT adds to it (save_embedding_layers=False) or "


def _is_by_peft(placement: Placement) -> bool:
    """Whether what an adapter has as a whole is what PEFT adds to the file if an embedding is targeted: its weight, as
    it was before training."""
    return not placement.pieces and all(".base_layer." in info.name for info in placement.saved.values())


def _refuse_conflicts(adapters: Sequence[Adapter], placements: Sequence[Placement]) -> None:
    """Raise MergeError for a tensor that one adapter brings whole and another one brings or changes too, or of which an
    adapter that brings it changes a part."""
    parted = []
    for second in placements if any(placement.saved for placement in placements) else ():
        whole = second.saved.keys() | second.copied.keys()
        parts = {matrix.stored[0].name for name, matrix in second.into.items() if name not in whole}
        parted.append(parts - second.trained.keys())
    for number, placement in enumerate(placements):
        if not placement.saved:
            continue
        for other, (second, parts) in enumerate(zip(placements, parted, strict=True)):
            both = [name for name in placement.saved if name in parts]
            if number != other:
                both += [name for name in placement.saved if name in second.saved or name in second.trained]
            if both:
                raise MergeError(
                    f"{adapters[number].path}: holds {listed(both)} as a whole, which {adapters[other].path} trained "
                    f"too; such adapters cannot be added up, {_SAVED_BY_PEFT if _is_by_peft(placement) else ''}merge "
                    "one of them"
                )


def _refuse_lone(adapters: Sequence[Adapter], changes: Mapping[str, Sequence[Change]]) -> None:
    """Raise MergeError for an update that cannot be combined, of a weight that another adapter changes too."""
    for name, found in changes.items():
        for one in found:
            if one.method.COMBINES != "alone":
                continue
            others = [other for other in found if other.adapter != one.adapter and other.into.span == one.into.span]
            if others:
                raise MergeError(
                    f"{adapters[one.adapter].path}: its update of {name} ({one.trained.method}) is for the base's own "
                    f"weight, which {adapters[others[0].adapter].path} changes too; such adapters cannot be added up, "
                    "merge one of them"
                )


def _refuse_overlaps(
    name: str, changes: Sequence[Change], pieces: Sequence[Piece], owner: int | None, adapters: Sequence[Adapter]
) -> None:
    """Raise MergeError for parts of a tensor that meet, or that come twice.

    `owner` is the adapter that brings the tensor as a whole, if one does. What is added to a piece must be of the same
    adapter and go into all of it.
    """
    for piece in pieces if owner is not None else ():
        if not piece.above or piece.adapter != owner:
            raise MergeError(_conflict(name, adapters[owner or 0], adapters[piece.adapter]))
    spans: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for piece in pieces:
        spans.setdefault(piece.span, ([], []))[0].append(piece.adapter)
    for change in changes:
        spans.setdefault(change.into.span, ([], []))[1].append(change.adapter)
    end = before = 0
    for (first, last), (brought, added) in sorted(spans.items()):
        own = [*brought, *added]
        if first < end:
            raise MergeError(_conflict(name, adapters[before], adapters[own[0]]))
        other = next((one for one in added if one != brought[0]), None) if brought else None
        if len(brought) > 1 or other is not None:
            raise MergeError(_conflict(name, adapters[own[0]], adapters[own[1] if other is None else other]))
        end, before = last, own[0]


def _conflict(name: str, first: Adapter, second: Adapter) -> str:
    if first is second:
        return (
            f"{first.path}: changes one part of {name} in two ways of which one replaces it; such an adapter cannot be "
            "merged, train it with one of the two"
        )
    return (
        f"{first.path}: changes a part of {name}, which {second.path} changes in another way; such adapters cannot be "
        "added up, merge one of them"
    )
