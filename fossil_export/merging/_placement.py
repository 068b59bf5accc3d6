"""What adapters change in the base, before it is laid out in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import Matrix
from fossil_export.errors import MergeError, listed
from fossil_export.merging._change import Change


@dataclass(frozen=True)
class Pair:
    """Two tensors that only their values tell apart, and the names they would be stored by."""

    names: tuple[str, str]
    tensors: tuple[TensorInfo, TensorInfo]


@dataclass
class Placement:
    """What one adapter changes, by the name of the tensor in the base; filled step by step while the plan is made.

    `saved` replaces a tensor by one of the adapter's, `copied` makes a tensor from another one of the base's,
    `trained` adds an update to a weight, which lies in a matrix (`into`), `added` names tensors that the base does not
    have. `labels` is the number of outputs of a classifier that came with the adapter. `undecided` are pairs of tensors
    that the base ties, of which only their values tell whether training parted them; `tied` says so once it is known.
    `untie` are the config's fields that must be false, by their keys, and `architecture` is the class that has what was
    added, if the base's has not.
    """

    saved: dict[str, TensorInfo] = field(default_factory=dict)
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
    another one of the base's). `task_type` is that of the adapter whose classifier has `labels` outputs; `undecided` is
    by adapter (see `Placement`).
    """

    changes: Mapping[str, tuple[Change, ...]]
    sources: Mapping[str, tuple[TensorInfo, int | None]]
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
    for number, (adapter, placement, weight) in enumerate(zip(adapters, placements, weights, strict=True)):
        if placement.saved and weight != 1.0:
            raise MergeError(
                f"{adapter.path}: holds whole trained tensors ({listed(sorted(placement.saved))}), which replace the "
                f"base's and cannot be taken {weight:g} times; leave its weight at 1"
            )
        for name, info in placement.saved.items():
            sources[name] = (info, number)
        for name, trained in placement.trained.items():
            change = Change(number, trained, placement.into[name], weight)
            tensor = name if name in placement.saved or name in placement.copied else change.into.stored[0].name
            changes[tensor] = (*changes.get(tensor, ()), change)
    _refuse_conflicts(adapters, placements)
    sizes = {placement.vocab_size for placement in placements} - {None}
    heads = [(placement.labels, one) for one, placement in zip(adapters, placements, strict=True) if placement.labels]
    labels, classifier = heads[0] if heads else (None, None)
    return Places(
        changes=changes,
        sources=sources,
        added=tuple(dict.fromkeys(name for placement in placements for name in placement.added)),
        untie=tuple(dict.fromkeys(one for placement in placements for one in placement.untie)),
        vocab_size=next(iter(sizes), None),
        labels=labels,
        task_type=classifier.config.get("task_type") if classifier is not None else None,
        architecture=next((placement.architecture for placement in placements if placement.architecture), None),
        warnings=tuple(dict.fromkeys(line for placement in placements for line in placement.warnings)),
        undecided=tuple(
            placement.undecided[0].names if placement.undecided else None for placement in placements
        ),
    )


def _refuse_conflicts(adapters: Sequence[Adapter], placements: Sequence[Placement]) -> None:
    """Raise MergeError for a tensor that one adapter brings whole and another one brings or changes too, or of which an
    adapter that brings it changes a part."""
    for number, placement in enumerate(placements):
        for other, second in enumerate(placements):
            parts = {matrix.stored[0].name for name, matrix in second.into.items()} - second.trained.keys()
            both = [name for name in placement.saved if name in parts]
            if number != other:
                both += [name for name in placement.saved if name in second.saved or name in second.trained]
            if both:
                raise MergeError(
                    f"{adapters[number].path}: holds {listed(both)} as a whole, which {adapters[other].path} trained "
                    "too; such adapters cannot be added up, merge one of them"
                )
