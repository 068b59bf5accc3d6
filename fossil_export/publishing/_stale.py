"""What a repository holds already that would be taken for a part of what is published."""

from __future__ import annotations

from collections.abc import Iterable

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards import Facts
from fossil_export.checkpoints._companions import CERTIFICATE, PROVENANCE
from fossil_export.errors import HubError, listed
from fossil_export.publishing._target import Target


def refuse_base(facts: Facts, target: Target, branch: str | None = None) -> None:
    """Raise HubError for a model that would replace its own base, on main or on the `branch` that was read: the next
    merge would be on top of this one."""
    own = facts.base is not None and facts.base.lower() == target.repo_id.lower()
    onto = target.revision or "main"
    if own and KINDS[facts.kind].whole and not target.create_pr and onto in ("main", branch):
        raise HubError(
            f"{target.repo_id}: is the base itself, and the next merge would be on top of this one; choose another "
            "repository, or --revision or --create-pr"
        )


def stale(facts: Facts, there: Iterable[str]) -> list[str]:
    """Files of an earlier model: weights that would be loaded instead, a record and a certificate that are of others.

    Raises HubError where a merged model would meet an adapter, or an adapter a model: with an adapter in it, loaders
    take a repository's model for that of the adapter's base.
    """
    kind = KINDS[facts.kind]
    root = [name for name in there if "/" not in name]
    if kind.by_itself:
        return []
    if kind.not_beside.intersection(root):
        raise HubError(f"{facts.repo_id}: {kind.clash}; choose another repository")
    records = [name for name in (PROVENANCE, CERTIFICATE) if name in root]
    found = [*records, *(name for name in root if kind.replaces(name))]
    return [name for name in found if name not in facts.files]


def removal_warnings(repo_id: str, removed: list[str], planned: bool = False) -> list[str]:
    """What to say of files that went with the commit, or will go if it is only `planned`."""
    if not removed:
        return []
    past = "would have been taken for this one's and went with this commit; its history still has them"
    future = "would be taken for this one's and will go with the commit; its history keeps them"
    return [f"{repo_id}: {listed(removed)} of an earlier model {future if planned else past}"]
