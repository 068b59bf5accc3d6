"""What `verify` found of a published artifact goes beside it: the certificate, quoted by the model card."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from fossil_export._progress import Shown, begin, reporting
from fossil_export.artifacts._parts import parts_of
from fossil_export.checkpoints._companions import CARD, CERTIFICATE
from fossil_export.errors import CheckpointError, HubError, listed
from fossil_export.publishing._about import card_for, facts_of, holds_template, local_names
from fossil_export.publishing._paths import Paths
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._result import PushResult
from fossil_export.storage import Origin, find_origin
from fossil_export.storage.hub._remote import HubFolder
from fossil_export.verifying._verdict import Verification, certificate_file

_OURS = (CARD, CERTIFICATE)


def target_of(artifact: str | Origin, create_pr: bool = False) -> tuple[Repository, HubFolder]:
    """Where the certificate of an artifact on the Hub goes, and the artifact's files.

    Raises HubError for what is no repository there, or may not be written to.
    """
    origin = artifact if isinstance(artifact, Origin) else find_origin(artifact, CheckpointError, "artifact")
    source = origin.folder
    if not isinstance(source, HubFolder) or source.prefix or origin.file is not None:
        raise HubError(
            f"{origin.name}: is no repository on the Hub; verify the folder, then push it with its certificate"
        )
    repository = Repository(source.repository, origin.branch, create_pr)
    repository.check()
    return repository, source


@reporting
def publish_certificate(
    result: Verification,
    *,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: Shown = False,
) -> PushResult:
    """Commit the certificate of an artifact that was verified by its id on the Hub, and the model card that quotes it.

    It goes to the branch that was verified (default: main), or into a pull request.

    Args:
        result: What `verify` returned of an artifact on the Hub.
        create_pr: True opens a pull request instead of committing.
        commit_message: Title of the commit. Default: one that says what was published.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        PushResult: `url` (the page), `repo_id`, `revision`, `commit`, `pr_url`, `changed` (False if all was there
            already), `files`, `left_behind`, `removed`, `nbytes`, `seconds`, `warnings`, and `to_dict()`.

    Raises:
        FossilExportError: In one line with the remedy.
        HubError: The artifact is no repository on the Hub, or the files there are no longer those that were verified.

    Example:
        >>> import fossil_export
        >>> found = fossil_export.verify("user/my-model")  # doctest: +SKIP
        >>> fossil_export.publish_certificate(found, create_pr=True)  # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd

    started = time.perf_counter()
    repository, source = target_of(result.origin, create_pr)
    parts = parts_of(result.artifact)
    paths = Paths([result.artifact, result.base.location], local_names(parts.record, None, parts.config))
    content = paths.published(CERTIFICATE, certificate_file(result))
    certificate = json.loads(content)
    names = tuple(sorted({*parts.names, *_OURS}))
    chats = holds_template({name: parts.path(name) for name in parts.names})
    facts, problems = facts_of(repository.repo_id, parts.kind, names, parts.record, certificate, parts.config, chats)
    notes: list[str] = []
    addition = CommitOperationAdd(CERTIFICATE, content)

    def build(head: str, there: Mapping[str, str]) -> list[Any]:
        entries = {name: entry.blob for name, entry in source.entries.items() if name not in _OURS}
        changed = [name for name, blob in entries.items() if there.get(name) != blob]
        if changed and head != source.commit:
            raise HubError(
                f"{repository.repo_id}: {listed(changed)} is not what was verified any more; verify it again"
            )
        text, notes[:] = card_for(repository, facts, None, head, there)
        card = CommitOperationAdd(CARD, text)
        repository.upload(addition, card)
        return [addition, card]

    begin(f"publishing the certificate at {repository.repo_id}")
    commit = repository.commit(build, commit_message or "Add what fossil-export verify found")
    return PushResult.of(repository, commit, started, _OURS, len(content), (*repository.notes, *problems, *notes))
