"""A merge straight to the Hub: fetch a file, merge it, upload it, delete it; one commit at the end.

What is uploaded is seen by nobody before the commit. A journal beside the file at hand remembers what is done, so
that an interrupted merge goes on with the next file.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, table
from fossil_export._spellings import parse_size
from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards import Facts
from fossil_export.checkpoints._companions import CARD
from fossil_export.errors import FossilExportError, OutputError, longer
from fossil_export.merging._finish import Finished, finish
from fossil_export.merging._given import AnyGiven
from fossil_export.merging._merge import survival_warnings
from fossil_export.merging._planning import plan_merge, settled
from fossil_export.merging._provenance import provenance, survival_record
from fossil_export.merging._quantization_error import ratio_warnings
from fossil_export.merging._run import Writer
from fossil_export.merging._survival import Survival
from fossil_export.publishing._about import card_for, facts_of, holds_template, local_names
from fossil_export.publishing._carrier import Carrier
from fossil_export.publishing._closing import Closing, closing
from fossil_export.publishing._moves import StreamPlan, plan_moves
from fossil_export.publishing._operations import Operation
from fossil_export.publishing._paths import Paths
from fossil_export.publishing._repository import Commit, CopyRefusedError, Repository
from fossil_export.publishing._result import PushResult
from fossil_export.publishing._stale import refuse_base, stale
from fossil_export.publishing._workplace import workplace
from fossil_export.storage import fetch

if TYPE_CHECKING:
    import torch

    from fossil_export.checkpoints.quantized._trained_on import TrainedOn


@dataclass(frozen=True)
class StreamResult:
    """A merged model on the Hub.

    Attributes:
        push: The `PushResult`, with the page's `url`.
        plan: What was done.
        survival: By tensor: how much of the update rounding left.
        copied: Files that the Hub copied from the base's repository itself.
        resumed: How many files an earlier, interrupted call had done.
    """

    push: PushResult
    plan: StreamPlan
    survival: Mapping[str, Survival]
    copied: tuple[str, ...]
    resumed: int

    def __repr__(self) -> str:
        return line(
            "StreamResult", f"of {len(self.survival)} tensors merged, {self.resumed} files taken up; {self.push!r}"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("page", self.push.url),
            ("commit", self.push.commit[:12]),
            ("tensors", f"{len(self.survival)} of {self.plan.merge.parameters} merged"),
            ("files", f"{len(self.push.files)}, of which the Hub copied {len(self.copied)}"),
            ("taken up", f"{self.resumed} files of an earlier run" if self.resumed else None),
            ("time", f"{self.push.seconds:.1f} s"),
        ]
        return table("Merged and published", rows, self.push.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        merge = self.plan.merge
        return {
            **self.push.to_dict(),
            "copied": list(self.copied),
            "resumed": self.resumed,
            "tensors_merged": len(self.survival),
            "tensors": len(merge.tensors),
            "survival": survival_record(self.survival),
            "plan": self.plan.to_dict(),
        }


@reporting
def merge_to_hub(
    adapter: AnyGiven,
    repo_id: str,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
    trained_on: str | Mapping[str, Any] | TrainedOn = "auto",
    into: str = "trained",
    device: str = "cpu",
    hash: bool = False,  # noqa: A002  named as the command's option
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    max_disk: int | str | None = None,
    cache_dir: str | Path | None = None,
    progress: Shown = False,
) -> StreamResult:
    """Merge an adapter and publish the model, with about one file on the disk at a time.

    Files that the adapter does not touch are copied on the Hub. All appears in one commit. Interrupted, the same call
    goes on where it stopped.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder"). A list adds the updates of several in their order; a pair
            (adapter, 0.7) adds 0.7 times its update.
        repo_id: The repository on the Hub, "user/name". It is made if it is not there.
        base: The base model: a folder, a weights file, an address or an id on the Hub. Default: the one that the
            adapter names, at the revision it names.
        weights: A finite number for each adapter, its update being multiplied by it. Default: 1 for each.
        dtype: "auto" (each tensor keeps its own), or the dtype of all floating-point tensors: "float32", "bfloat16",
            "float16" or one of torch's (`torch.bfloat16`).
        max_shard_size: Cut the weights into new files of at most this size: bytes, or text such as "5GB". Default: the
            base's files.
        trained_on: How the base was quantized while the adapter was trained (QLoRA): "nf4", "fp4", "int8", "fp8",
            "unquantized", the settings of a BitsAndBytesConfig as a dict, or "auto" (default): what the adapter's files
            say.
        into: "trained" (default) adds the updates to the base as training saw it, "original" to its stored weights.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        private: True makes a new repository private. One that is there stays as it is.
        revision: The branch to commit to, made if it is not there. Default: main.
        create_pr: True opens a pull request instead of committing.
        commit_message: Title of the commit. Default: one that says what was published.
        max_disk: Never have more on this disk at once: bytes, or text such as "20GB". Default: no limit.
        cache_dir: Where the file at hand and the journal lie. Default: ~/.cache/fossil-export.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        StreamResult: `push` (a `PushResult`, with the page's `url`), `survival` (by tensor), `copied` (files that the
            Hub copied from the base), `resumed` (files of an earlier call), `plan`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> fossil_export.merge_to_hub("my-adapter", "user/my-model", max_disk="20GB")  # doctest: +SKIP
    """
    plan = plan_stream(
        adapter,
        base,
        weights=weights,
        dtype=dtype,
        max_shard_size=max_shard_size,
        max_disk=max_disk,
        trained_on=trained_on,
        into=into,
    )
    return run_stream(
        plan,
        repo_id,
        device=device,
        hash=hash,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        cache_dir=cache_dir,
    )


@reporting
def plan_stream(
    adapter: AnyGiven,
    base: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
    max_disk: int | str | None = None,
    trained_on: str | Mapping[str, Any] | TrainedOn = "auto",
    into: str = "trained",
    progress: Shown = False,
) -> StreamPlan:
    """What `merge_to_hub` will do with each file, from headers alone.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder"). A list adds the updates of several in their order; a pair
            (adapter, 0.7) adds 0.7 times its update.
        base: The base model: a folder, a weights file, an address or an id on the Hub. Default: the one that the
            adapter names, at the revision it names.
        weights: A finite number for each adapter, its update being multiplied by it. Default: 1 for each.
        dtype: "auto" (each tensor keeps its own), or the dtype of all floating-point tensors: "float32", "bfloat16",
            "float16" or one of torch's (`torch.bfloat16`).
        max_shard_size: Cut the weights into new files of at most this size: bytes, or text such as "5GB". Default: the
            base's files.
        max_disk: Never have more on this disk at once: bytes, or text such as "20GB". Default: no limit.
        trained_on: How the base was quantized while the adapter was trained (QLoRA): "nf4", "fp4", "int8", "fp8",
            "unquantized", the settings of a BitsAndBytesConfig as a dict, or "auto" (default): what the adapter's files
            say.
        into: "trained" (default) adds the updates to the base as training saw it, "original" to its stored weights.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        StreamPlan: `moves` (the way of each file), `disk` (the most bytes at once), `fetched` (bytes), `merge` (the
            `MergePlan`), and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_stream("my-adapter", max_disk="20GB")  # doctest: +SKIP
        >>> plan.disk, plan.fetched  # doctest: +SKIP
        (5368709120, 15032385536)
    """
    merge = plan_merge(
        adapter,
        base,
        weights=weights,
        dtype=dtype,
        max_shard_size=max_shard_size,
        trained_on=trained_on,
        into=into,
    )
    return plan_moves(merge, None if max_disk is None else parse_size(max_disk, "max_disk", OutputError))


@reporting
def run_stream(
    plan: StreamPlan,
    repo_id: str,
    *,
    device: str = "cpu",
    hash: bool = False,  # noqa: A002
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Shown = False,
) -> StreamResult:
    """Carry out a plan that `plan_stream` made.

    Args:
        plan: What `plan_stream` returned.
        repo_id: The repository on the Hub, "user/name". It is made if it is not there.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        private: True makes a new repository private. One that is there stays as it is.
        revision: The branch to commit to, made if it is not there. Default: main.
        create_pr: True opens a pull request instead of committing.
        commit_message: Title of the commit. Default: one that says what was published.
        cache_dir: Where the file at hand and the journal lie. Default: ~/.cache/fossil-export.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        StreamResult: `push` (a `PushResult`, with the page's `url`), `survival` (by tensor), `copied` (files that the
            Hub copied from the base), `resumed` (files of an earlier call), `plan`, and `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_stream("my-adapter")  # doctest: +SKIP
        >>> fossil_export.run_stream(plan, "user/my-model", progress=True)  # doctest: +SKIP
    """
    started = time.perf_counter()
    repository = Repository(repo_id, revision, create_pr)
    repository.foresee()
    merge = plan.merge
    fetch(*(merge.needed if plan.remote is None else (adapter.needed for adapter in merge.adapters)), whole=True)
    if any(plan.merge.undecided):
        plan = plan_moves(settled(plan.merge), plan.max_disk)
    merge = plan.merge
    with Writer(merge, device) as writer, workplace(plan, repository, cache_dir) as folder:
        begin(f"opening {repo_id}")
        repository.prepare(private)
        _refuse_target(plan, repository)
        carrier = Carrier(plan, repository, folder)
        try:
            carrier.take_up()
            carrier.carry(writer)
            published = _publish(carrier, repository, hash, commit_message or KINDS["merged"].commit_title)
        except FossilExportError as problem:
            if carrier.state:
                raise longer(problem, f" ({carrier.state})") from problem
            raise
        shutil.rmtree(folder, ignore_errors=True)
    commit, finished = published.commit, published.finished
    notes = [*repository.notes, *merge.warnings, *published.notes]
    notes += [*survival_warnings(merge, finished.survival), *ratio_warnings(merge, finished.ratios)]
    return StreamResult(
        push=PushResult.of(
            repository, commit, started, published.files, carrier.nbytes, notes, published.removed, merge.left_behind
        ),
        plan=plan,
        survival=finished.survival,
        copied=carrier.copied,
        resumed=carrier.resumed,
    )


@dataclass(frozen=True)
class _Published:
    commit: Commit
    files: tuple[str, ...]
    removed: tuple[str, ...]
    notes: list[str]
    finished: Finished


def _refuse_target(plan: StreamPlan, repository: Repository) -> None:
    """Raise HubError where what the repository holds would stop the commit, hours from now."""
    head = repository.head()
    home = plan.merge.base.home
    configs = [name for name in home.root_names() if name.endswith(".json")]
    home.fetch([name for name in configs if len(home.blob(name) or "") != 64])  # the record has their hashes
    facts, _ = _facts(plan, repository, provenance(plan.merge, {}), tuple(file.name for file in plan.merge.files))
    there = repository.files(head)
    refuse_base(facts, repository, plan.merge.base_branch)
    stale(facts, there)
    repository.notes += repository.validate(card_for(repository, facts, None, head, there)[0])


def _publish(carrier: Carrier, repository: Repository, with_hash: bool, title: str) -> _Published:
    """What goes beside the weights, and the commit."""
    plan = carrier.plan
    merge = plan.merge
    local = local_names(provenance(merge, {}))
    carrier.paths = Paths([merge.base.location, *(one.path for one in merge.adapters)], local)
    finished = finish(merge, carrier.results(with_hash), carrier)
    ends: list[Closing] = []
    while True:
        names = (*sorted(carrier.operations), CARD)
        facts, problems = _facts(plan, repository, finished.record, names)
        merge.check()

        def build(head: str, there: Mapping[str, str]) -> Sequence[Operation]:
            done = tuple(carrier.operations.values())
            ends[:] = [closing(repository, facts, None, done, head, there)]  # noqa: B023  used before the next round
            return ends[0].operations

        begin("committing")
        try:
            commit = repository.commit(build, title)
        except CopyRefusedError as problem:
            carrier.pass_through(str(problem))
            continue
        # There is no folder here to verify.
        branch = f"refs/pr/{commit.pr_url.rpartition('/')[2]}" if commit.pr_url else repository.revision
        where = repository.repo_id + (f"@{branch}" if branch else "")
        said = [note.replace("verify DIR` first", f"verify {where} --push-to-hub`") for note in ends[0].notes]
        return _Published(commit, names, ends[0].removed, [*problems, *said], finished)


def _facts(
    plan: StreamPlan, repository: Repository, record: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[Facts, list[str]]:
    merge = plan.merge
    config = merge.base.config if merge.config is None else json.loads(merge.config)
    here = {name: path for name, path in merge.companions.items() if path.is_file()}
    found = None if config is None else dict(config)
    return facts_of(repository.repo_id, "merged", names, record, None, found, holds_template(here))
