"""A merge straight to the Hub: fetch a file, merge it, upload it, delete it; one commit at the end.

What is uploaded is seen by nobody before the commit. A journal beside the file at hand remembers what is done, so
that an interrupted merge goes on with the next file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fossil_export.adapters import Adapter, load_adapter
from fossil_export.checkpoints.checkpoint import identity, sha256
from fossil_export.checkpoints.companions import PROVENANCE
from fossil_export.checkpoints.jsonfile import write_json
from fossil_export.checkpoints.staging import lock_folder
from fossil_export.errors import FossilExportError, HubError, OutputError
from fossil_export.hub import expanded
from fossil_export.hub.errors import retried
from fossil_export.hub.remote import HubFolder, is_sound
from fossil_export.merging.api import survival_warnings
from fossil_export.merging.layout import parse_size
from fossil_export.merging.plan import plan_merge
from fossil_export.merging.provenance import provenance, survival_record
from fossil_export.merging.run import Runner
from fossil_export.merging.survival import Survival
from fossil_export.publishing.about import facts_of
from fossil_export.publishing.card import warnings as card_warnings
from fossil_export.publishing.moves import Move, StreamPlan, base_path, plan_moves
from fossil_export.publishing.push import (
    Progress,
    PushResult,
    address,
    card_and_stale,
    message,
    removal_warnings,
    without_paths,
)
from fossil_export.publishing.repository import CopyRefusedError, Repository, digest_of, uploaded
from fossil_export.version import __version__


@dataclass(frozen=True)
class StreamResult:
    """A merged model on the Hub. `resumed` counts the files that an earlier, interrupted call had done; `survival` is
    by tensor; `copied` are the files that the Hub copied from the base's repository itself."""

    push: PushResult
    plan: StreamPlan
    survival: Mapping[str, Survival]
    copied: tuple[str, ...]
    resumed: int

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


def merge_to_hub(
    adapter: Adapter | str | Path,
    repo_id: str,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: int | str | None = None,
    device: str = "cpu",
    hash: bool = False,  # noqa: A002  named as the command's option
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    max_disk: int | str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress = lambda step: None,
) -> StreamResult:
    """Merge `adapter` into `base` and publish the model as `repo_id`, with about one file on the disk at a time.

    Arguments are those of `merge` and `push`, and: `max_disk` (bytes or like "20GB") is never exceeded; `cache_dir` is
    where the file at hand and the journal lie (default: ~/.cache/fossil-export). Files that the adapter does not touch
    are copied on the Hub. Interrupted, the same call goes on where it stopped. Raises a FossilExportError in one line.
    """
    plan = plan_stream(adapter, base, dtype=dtype, max_shard_size=max_shard_size, max_disk=max_disk)
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
        progress=progress,
    )


def plan_stream(
    adapter: Adapter | str | Path,
    base: str | Path | None = None,
    *,
    dtype: str = "auto",
    max_shard_size: int | str | None = None,
    max_disk: int | str | None = None,
) -> StreamPlan:
    """What `merge_to_hub` will do with each file, from headers alone."""
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    merge = plan_merge(adapter, base, dtype=dtype, max_shard_size=max_shard_size)
    return plan_moves(merge, None if max_disk is None else parse_size(max_disk, "max_disk"))


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
    progress: Progress = lambda step: None,
) -> StreamResult:
    """Carry out a plan that `plan_stream` made; arguments as for `merge_to_hub`."""
    started = time.perf_counter()
    repository = Repository(repo_id, revision, create_pr)
    with _workplace(plan, repository, cache_dir) as folder:
        progress(f"opening {repo_id}")
        repository.prepare(private)
        stream = _Stream(plan, repository, folder, device, progress)
        try:
            commit, facts, problems, removed, copied = stream.run(hash, commit_message or message("merged"))
        except FossilExportError as problem:
            if stream.journal.done:
                done = f"{len(stream.journal.done)} of {len(plan.moves) - plan.count('copy')} files are uploaded"
                raise type(problem)(f"{problem} ({done}; the same command goes on from there)") from problem
            raise
        shutil.rmtree(folder, ignore_errors=True)
    merge = plan.merge
    notes = [*repository.warnings, *merge.warnings, *problems, *card_warnings(facts)]
    notes += [*removal_warnings(repository, removed), *survival_warnings(merge, stream.survival)]
    return StreamResult(
        push=PushResult(
            repo_id=repository.repo_id,
            revision=revision or "main",
            commit=commit.oid,
            url=address(repository, commit),
            pr_url=commit.pr_url,
            changed=commit.changed,
            files=facts.files,
            removed=tuple(removed),
            left_behind=merge.left_behind,
            nbytes=merge.nbytes,
            seconds=time.perf_counter() - started,
            warnings=tuple(notes),
        ),
        plan=plan,
        survival=stream.survival,
        copied=tuple(copied),
        resumed=stream.resumed,
    )


class Journal:
    """What is uploaded but not committed yet, in a file that is replaced whole: by name its size, SHA-256 and first
    bytes, and the survival of its tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self.done = dict(json.loads(path.read_bytes()))
            except ValueError:  # cut off by a crash
                path.unlink()

    def add(self, name: str, upload: Any, survival: Mapping[str, Survival]) -> None:
        self.done[name] = {
            "size": upload.size,
            "sha256": upload.sha256.hex(),
            "sample": base64.b64encode(upload.sample).decode(),
            "survival": {tensor: asdict(sums) for tensor, sums in survival.items()},
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.done))
        partial.replace(self._path)

    def operation(self, name: str) -> Any:
        entry = self.done[name]
        return uploaded(name, entry["size"], entry["sha256"], base64.b64decode(entry["sample"]))

    def survival(self, name: str) -> dict[str, Survival]:
        return {tensor: Survival(**sums) for tensor, sums in self.done[name]["survival"].items()}


class _Stream:
    def __init__(self, plan: StreamPlan, repository: Repository, folder: Path, device: str, progress: Progress) -> None:
        self.plan = plan
        self.merge = plan.merge
        self.repository = repository
        self.folder = folder
        self.progress = progress
        self.device = device
        self.journal = Journal(folder / "journal.json")
        self.operations: dict[str, Any] = {}
        self.survival: dict[str, Survival] = {}
        self.resumed = 0

    def run(self, with_hash: bool, title: str) -> tuple[Any, Any, list[str], list[str], list[str]]:
        """Files, then everything else, then the commit; returns it with what is to be said of it."""
        self._take_up()
        with Runner(self.merge, self.device) as runner:
            for number, move in enumerate(self.plan.moves, 1):
                if move.file.name not in self.operations:
                    self._do(move, runner, f"[{number}/{len(self.plan.moves)}] {move.file.name}")
        copies = [move.file.name for move in self.plan.moves if move.way == "copy"]
        small = self._companions()
        copies += [name for name, operation in small.items() if hasattr(operation, "src_path_in_repo")]
        removed: list[str] = []
        while True:
            record = provenance(self.merge, self.survival, self._digests() if with_hash else None)
            names = (*(file.name for file in self.merge.files), *small, PROVENANCE)
            facts, problems = facts_of(
                self.repository.repo_id, "merged", (*names, "README.md"), record, None, self._config(small)
            )
            published = self._addition(PROVENANCE, write_json(without_paths(record)))
            self.repository.upload(published)

            def build() -> list[Any]:
                card, stale = card_and_stale(self.repository, facts, None)  # noqa: B023  used before the next round
                self.repository.upload(card)
                removed[:] = [operation.path_in_repo for operation in stale]
                weights = [self._operation(move) for move in self.plan.moves]
                return [*weights, *map(_fresh, small.values()), published, card, *stale]  # noqa: B023

            self.progress("committing")
            try:
                commit = self.repository.commit(build, title)
                break
            except CopyRefusedError as problem:
                self._pass_through(copies, small, problem)
                copies = []
        self.progress("checking what is published")
        self.repository.check(commit, self._expected(small))
        return commit, facts, problems, removed, copies

    def _take_up(self) -> None:
        """Go on from the journal of an earlier run, as far as the Hub still has what it uploaded."""
        shutil.rmtree(self.folder / "merging", ignore_errors=True)
        found = self.repository.holds(self.journal.operation(name).upload_info for name in self.journal.done)
        for name in [name for name, entry in self.journal.done.items() if entry["sha256"] not in found]:
            del self.journal.done[name]
        for name in self.journal.done:
            self.operations[name] = self.journal.operation(name)
            self.survival |= self.journal.survival(name)
        self.resumed = len(self.operations)
        self._tidy()

    def _tidy(self) -> None:
        """Of files of the base that an earlier run fetched, keep those that come next, whole or in part."""
        pending = (move for move in self.plan.moves if move.way != "copy" and move.file.name not in self.operations)
        remote, first = self.plan.remote, next(pending, None)
        wanted = {} if remote is None or first is None else {n: remote.entries[n].blob for n in first.sources}
        names = {self._local(name) for name in wanted}
        for path in (self.folder / "base").rglob("*"):
            if path.is_file() and path not in names and not any(blob in path.name for blob in wanted.values()):
                path.unlink()

    def _do(self, move: Move, runner: Runner, title: str) -> None:
        """One file: fetched, merged, uploaded, deleted."""
        file, name = move.file, move.file.name
        if move.way == "copy":
            return
        if move.way == "send":
            self.progress(f"{title}: uploading")
            self._upload(name, base_path(self.merge, name), {})
            return
        moved: dict[Path, Path] = {}
        for source in move.sources:
            self.progress(f"{title}: fetching" + ("" if source == name else f" {source}"))
            moved[base_path(self.merge, source)] = self._fetched(source)
        work = self.folder / "merging"
        work.mkdir(exist_ok=True)
        path = work / name
        self.progress(f"{title}: merging")
        try:
            if move.way == "change":
                # From here on it is no file of the base, and must not be taken for one after a crash.
                moved[base_path(self.merge, name)].replace(path)
                survival = runner.change(file, path, base_path(self.merge, name))
            else:
                path.unlink(missing_ok=True)
                survival = runner.write(file, path, moved)
        except OSError as problem:
            raise OutputError(
                f"{path}: writing failed: {problem.strerror}; make room, or work elsewhere with --cache-dir"
            ) from problem
        for source in move.drop:
            self._local(source).unlink(missing_ok=True)
        self.progress(f"{title}: uploading")
        self._upload(name, path, survival)
        path.unlink()

    def _upload(self, name: str, path: Path, survival: Mapping[str, Survival]) -> None:
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, path)
        self.repository.upload(operation)
        if operation._upload_mode == "regular":  # so small that it goes with the commit itself
            operation = CommitOperationAdd(name, path.read_bytes())
            self.repository.upload(operation)
        else:
            self.journal.add(name, operation.upload_info, survival)
        self.operations[name] = operation
        self.survival |= survival

    def _local(self, name: str) -> Path:
        remote = self.plan.remote
        assert remote is not None
        return self.folder / "base" / (remote.prefix + name)

    def _fetched(self, name: str) -> Path:
        """A file of the base on this disk, and nowhere else; held against the hash that the Hub lists."""
        from huggingface_hub import hf_hub_download

        remote, path = self.plan.remote, self._local(name)
        assert remote is not None
        for attempt in range(2):
            retried(
                lambda: hf_hub_download(
                    remote.repository,
                    remote.prefix + name,
                    revision=remote.commit,
                    local_dir=self.folder / "base",
                    force_download=attempt > 0,  # noqa: B023  called at once
                ),
                remote.repository,
                f"fetching {name}",
            )
            if is_sound(path, remote.entries[name]):
                return path
            path.unlink()
        raise HubError(
            f"{remote.repository}: {name} came twice with other bytes than the Hub lists; run the same command again "
            "later"
        )

    def _companions(self) -> dict[str, Any]:
        """What a model folder has beside its weights and records, as operations by name."""
        from huggingface_hub import CommitOperationCopy

        merge, remote = self.merge, self.plan.remote
        found: dict[str, Any] = {}
        small = [name for name, path in merge.companions.items() if self._is_small(name, path)]
        merge.base.source.fetch([name for name in small if merge.companions[name] == base_path(merge, name)])
        for name, path in merge.companions.items():
            if name in small or remote is None:
                found[name] = self._addition(name, path)
            else:
                found[name] = CommitOperationCopy(
                    remote.prefix + name, name, remote.commit, **self._source_repository(remote)
                )
        if merge.index is not None:
            found[merge.index[0]] = self._addition(*merge.index)
        if merge.config is not None:
            found["config.json"] = self._addition("config.json", merge.config)
        self.repository.upload(*(operation for operation in found.values() if hasattr(operation, "upload_info")))
        return found

    def _is_small(self, name: str, path: Path) -> bool:
        """Whether a companion is sent: it is the adapter's, or so small that the Hub keeps it in git."""
        remote = self.plan.remote
        ours = path != base_path(self.merge, name)
        return ours or remote is None or len(remote.entries[name].blob) != 64

    def _addition(self, name: str, content: Path | bytes) -> Any:
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(name, content)

    def _operation(self, move: Move) -> Any:
        from huggingface_hub import CommitOperationCopy

        name, remote = move.file.name, self.plan.remote
        if name in self.operations:
            return self.operations[name]
        assert remote is not None
        return CommitOperationCopy(remote.prefix + name, name, remote.commit, **self._source_repository(remote))

    def _source_repository(self, remote: HubFolder) -> dict[str, str]:
        if remote.repository == self.repository.repo_id:
            return {}
        return {"src_repo_id": remote.repository, "src_repo_type": "model"}

    def _pass_through(self, copies: list[str], small: dict[str, Any], problem: Exception) -> None:
        """Fetch and upload, one by one, what the Hub does not copy."""
        remote = self.plan.remote
        assert remote is not None
        if not copies:
            raise HubError(str(problem)) from problem
        biggest = max(remote.entries[name].size for name in copies)
        limit = self.plan.max_disk
        if limit is not None and biggest + self.plan.adapter_bytes > limit:
            raise OutputError(
                f"the Hub does not copy from {remote.repository}, and passing its files through takes "
                f"{biggest + self.plan.adapter_bytes:,} bytes at once, --max-disk allows {limit:,}; allow more"
            )
        self.repository.warnings.append(
            f"the Hub does not copy from {remote.repository} to {self.repository.repo_id}; {len(copies)} untouched "
            "files were passed through this machine"
        )
        _check_room(self.folder, biggest)
        weights = {move.file.name for move in self.plan.moves}
        for number, name in enumerate(copies, 1):
            self.progress(f"[{number}/{len(copies)}] {name}: passing through, as the Hub does not copy it")
            if name in weights:
                self._upload(name, self._fetched(name), {})
            else:
                content = self._fetched(name).read_bytes()
                small[name] = self._addition(name, content)
                self.repository.upload(small[name])
            self._local(name).unlink()

    def _config(self, small: Mapping[str, Any]) -> dict[str, Any] | None:
        if "config.json" not in small:
            return None
        with small["config.json"].as_file() as file:
            return dict(json.loads(file.read()))

    def _digests(self) -> dict[str, str]:
        """SHA-256 of every published weights file."""
        untouched = {
            entry["file"]: entry["sha256"] for entry in identity(self.merge.base, full=True) if entry["sha256"]
        }
        done = {name: operation.upload_info.sha256.hex() for name, operation in self.operations.items()}
        return {file.name: done.get(file.name) or untouched[file.name] for file in self.merge.files}

    def _expected(self, small: Mapping[str, Any]) -> dict[str, str]:
        """By name, what the Hub must list as the hash of each file."""
        expected = {name: digest_of(operation) for name, operation in self.operations.items()}
        remote = self.plan.remote
        for name in (*(file.name for file in self.merge.files), *small):
            operation = small.get(name)
            if operation is not None and not hasattr(operation, "src_path_in_repo"):
                expected[name] = digest_of(operation)
            elif name not in expected and remote is not None:
                expected[name] = remote.entries[name].blob
        return expected


def _fresh(operation: Any) -> Any:
    """The client marks copies as done once they were tried; every attempt takes a new one."""
    from huggingface_hub import CommitOperationCopy

    if not isinstance(operation, CommitOperationCopy):
        return operation
    return CommitOperationCopy(
        operation.src_path_in_repo,
        operation.path_in_repo,
        operation.src_revision,
        operation.src_repo_id,
        operation.src_repo_type,
    )


@contextmanager
def _workplace(plan: StreamPlan, repository: Repository, cache_dir: str | Path | None) -> Iterator[Path]:
    """This merge's own folder, held for as long as it runs. Raises OutputError for want of room or permission."""
    root = expanded(cache_dir, OutputError) if cache_dir is not None else _default_cache()
    folder = root.absolute() / "stream" / _key(plan, repository)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be written: {problem.strerror}; choose another --cache-dir") from problem
    if lock is None:
        raise OutputError(f"{folder}: the same merge is running already; wait for it")
    try:
        _check_room(folder, max((move.disk for move in plan.moves), default=0))
        yield folder
    finally:
        os.close(lock)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free + sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )  # what an interrupted run left is used or removed
    if free < needed:
        raise OutputError(
            f"{folder}: takes {needed:,} bytes at once, {free:,} are free; make room, or work elsewhere with "
            "--cache-dir"
        )


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fossil-export"


def _key(plan: StreamPlan, repository: Repository) -> str:
    """Tells this merge to this place from every other one."""
    merge = plan.merge
    what = {
        "version": __version__,
        "to": [repository.repo_id, repository.revision, repository.create_pr],
        "base": [merge.base_name, merge.base_revision, identity(merge.base)],
        "times": [] if plan.remote is not None else [header.path.stat().st_mtime_ns for header in merge.base.files],
        "adapter": [sha256(path) for path in merge.adapter.files],
        "files": [[file.name, file.size, hashlib.sha256(file.header).hexdigest()] for file in merge.files],
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
