"""What a merge was asked to do, as every worker can be told it: names and settings, from which each makes the plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.errors import FossilExportError, MergeError
from fossil_export.merging._given import AnyGiven, Given, with_weights
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge
from fossil_export.storage import Origin, expanded, parse_name, pinned


@dataclass(frozen=True)
class Asked:
    """The arguments of `plan_merge`, without objects that only this process has. Relative paths are of the folder
    `here`."""

    adapters: tuple[str, ...]
    weights: tuple[float | None, ...]
    base: str | None
    options: Mapping[str, Any]
    here: str

    def plan(self) -> MergePlan:
        """Made anew, in this process; raises as `plan_merge` does."""
        before = _folder()
        try:
            _enter(self.here)
            given: list[Any] = [
                name if weight is None else (name, weight)
                for name, weight in zip(self.adapters, self.weights, strict=True)
            ]
            return plan_merge(given, self.base, **self.options)
        finally:
            _enter(before)

    def pinned(self, plan: MergePlan) -> Asked:
        """At the revisions that `plan` found, so that a branch which moves meanwhile is the same for all."""
        names = [_pinned(name, one.revision) for name, one in zip(self.adapters, plan.adapters, strict=True)]
        base = self.base
        if base is None and parse_name(plan.base_name) is not None:
            base = plan.base_name
        return replace(self, adapters=tuple(names), base=None if base is None else _pinned(base, plan.base_revision))


def asked_for(
    adapter: AnyGiven, base: str | Path | Origin | None, weights: Sequence[float] | None, options: Mapping[str, Any]
) -> Asked:
    """Raises MergeError for what no other process can be told."""
    given, numbers = with_weights(adapter, weights)
    if isinstance(base, Origin):
        raise MergeError(f"{base.name}: name the base by its path or id for a merge on a cluster")
    return Asked(
        tuple(_name(one) for one in given), numbers, None if base is None else _typed(base), dict(options), _folder()
    )


def _name(given: Given) -> str:
    if not isinstance(given, Adapter):
        return _typed(given)
    if given.name and parse_name(given.name) is not None:
        return _pinned(given.name, given.revision)
    return str(given.path.absolute())


def _typed(name: str | Path) -> str:
    """As it was typed, but for ~, which is another folder for another user."""
    return str(expanded(name, FossilExportError)) if str(name).startswith("~") else str(name)


def _pinned(name: str, revision: str | None) -> str:
    return pinned(name, revision) if not Path(name).exists() else name


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it is gone
        return "/"


def _enter(folder: str) -> None:
    """A machine without that folder has no relative paths of it either."""
    if Path(folder).is_dir():
        os.chdir(folder)
