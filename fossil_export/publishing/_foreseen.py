"""What would stop a push of a merged model, seen from its plan: before the merge, which may take hours."""

from __future__ import annotations

from fossil_export.cards import Facts
from fossil_export.merging._plan import MergePlan
from fossil_export.publishing._stale import refuse_base, stale
from fossil_export.publishing._target import Target
from fossil_export.storage.hub._names import is_on_hub, repository_of


def foresee_merged(plan: MergePlan, target: Target, exists: bool) -> None:
    """Raise HubError for a target that would refuse the merged model: its own base, or a repository with an adapter.

    Whether it `exists`, and one may write there, was asked before (`Target.foresee`).
    """
    on_hub = is_on_hub(plan.base_name) and plan.base_revision is not None
    facts = Facts(
        repo_id=target.repo_id,
        kind="merged",
        files=tuple(file.name for file in plan.files),
        record=None,
        certificate=None,
        config=None,
        base=repository_of(plan.base_name) if on_hub else None,
        base_revision=None,
        adapter=None,
        adapter_revision=None,
        base_card=None,
    )
    refuse_base(facts, target)
    if exists:
        stale(facts, target.files(target.head_below()))
