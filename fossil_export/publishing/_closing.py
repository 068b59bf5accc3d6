"""What ends a commit: the model card, and the removal of what is not of the model that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fossil_export.cards import Facts
from fossil_export.checkpoints._companions import CARD, CERTIFICATE
from fossil_export.publishing._about import card_for
from fossil_export.publishing._operations import Operation, digest_of, name_of
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._stale import removal_warnings, stale


@dataclass(frozen=True)
class Closing:
    """`operations` are all of the commit's, `removed` the names that go with it, `notes` what to tell the user."""

    operations: tuple[Operation, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]


def closing(
    repository: Repository,
    facts: Facts,
    own_card: str | None,
    operations: Sequence[Operation],
    head: str,
    there: Mapping[str, str],
) -> Closing:
    """Complete the `operations` of a commit on top of `head`, which holds the files `there`.

    A certificate that is there stays, and the card quotes it, where the commit changes nothing of what it is about.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    same = all(there.get(name_of(one)) == digest_of(one) for one in operations)
    if same and CERTIFICATE in there and CERTIFICATE not in facts.files:
        with suppress(ValueError, TypeError):  # what is no JSON goes as any other's does
            found = dict(json.loads(repository.read(CERTIFICATE, head)))
            facts = replace(facts, certificate=found, files=(*facts.files, CERTIFICATE))
    removed = stale(facts, there)
    text, notes = card_for(repository, facts, own_card, head, there)
    card = CommitOperationAdd(CARD, text)
    repository.upload(card)
    return Closing(
        operations=(*operations, card, *(CommitOperationDelete(name) for name in removed)),
        removed=tuple(removed),
        notes=(*notes, *removal_warnings(repository.repo_id, removed)),
    )
