"""Brings the files of a merge to the Hub one by one: fetched, merged, uploaded, deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fossil_export._progress import begin
from fossil_export.checkpoints._weights_file import header_of
from fossil_export.errors import HubError, OutputError
from fossil_export.merging._run import FileResult, Writer
from fossil_export.merging._survival import Survival
from fossil_export.publishing._journal import Journal
from fossil_export.publishing._moves import Move, StreamPlan, base_path
from fossil_export.publishing._operations import Copy, Operation
from fossil_export.publishing._paths import Paths
from fossil_export.publishing._repository import Repository
from fossil_export.publishing._workplace import BASE, JOURNAL, MERGING, check_room
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._errors import errno_of, retried
from fossil_export.storage.hub._remote import is_sound
from fossil_export.storage.hub._xet import index_bytes
from fossil_export.writing._sink import FolderSink

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Carrier:
    """`operations` are by name what the commit has to do for each file that is dealt with, `resumed` how many of them
    an earlier, interrupted run had done; `paths` are those of this machine, which are not published."""

    def __init__(self, plan: StreamPlan, repository: Repository, folder: Path) -> None:
        self.plan = plan
        self.paths = Paths()
        self.merge = plan.merge
        self.operations: dict[str, Operation] = {}
        self.resumed = 0
        self._repository = repository
        self._folder = folder
        self._journal = Journal(folder / JOURNAL)
        self._survival: dict[str, Mapping[str, Survival]] = {}
        self._refused = False
        self._here: set[str] = set()  # files of the base that were fetched and held against their hash

    def results(self, with_hash: bool) -> list[FileResult]:
        """The files of weights, which are all dealt with, and their SHA-256."""
        found, digests = [], self.digests() if with_hash else {}
        for file in self.merge.files:
            found.append(FileResult(file.name, file.size, self._survival.get(file.name, {}), digests.get(file.name)))
        return found

    @property
    def copied(self) -> tuple[str, ...]:
        """Files that the Hub is to copy."""
        return tuple(name for name, operation in self.operations.items() if isinstance(operation, Copy))

    @property
    def state(self) -> str:
        """How far it is, where it goes on from here; else nothing."""
        total = sum(self._refused or move.way != "copy" for move in self.plan.moves)
        done = len(self._journal.done)
        return f"{done} of {total} files are uploaded; the same command goes on from there" if done else ""

    def take_up(self) -> None:
        """Go on from the journal of an earlier run, as far as the Hub still has what it uploaded."""
        shutil.rmtree(self._folder / MERGING, ignore_errors=True)
        journal = self._journal
        found = self._repository.holds(journal.operation(name).upload_info for name in journal.done)
        for name in [name for name, entry in journal.done.items() if entry["sha256"] not in found]:
            del journal.done[name]
        for name in journal.done:
            self.operations[name] = journal.operation(name)
            self._survival[name] = journal.survival(name)
        self.resumed = len(self.operations)
        for move in self.plan.moves:
            if move.way == "copy" and move.file.name not in self.operations:
                self.operations[move.file.name] = self._copy(move.file.name)
        self._tidy()

    def carry(self, writer: Writer) -> None:
        """The weights, but for those that the Hub copies."""
        for number, move in enumerate(self.plan.moves, 1):
            if move.file.name not in self.operations:
                self._do(move, writer, f"[{number}/{len(self.plan.moves)}] {move.file.name}")

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        """What a model folder has beside its weights."""
        merge = self.merge
        unsent = {name for name in contents if name in merge.companions and not self.plan.is_sent(name)}
        merge.base.home.fetch(
            [name for name in contents if name not in unsent and contents[name] == base_path(merge, name)]
        )
        small: dict[str, Path | bytes] = {}
        for name, content in contents.items():
            if name in unsent:
                self.operations[name] = self._copy(name)
            elif name.endswith(".json") and (merge.index is None or name != merge.index[0]):
                found = content if isinstance(content, bytes) else content.read_bytes()
                small[name] = self.paths.published(name, found)
            else:
                small[name] = content
        self._send(small)

    def send(self, name: str, content: bytes) -> None:
        """A small file."""
        self._send({name: content})

    def pass_through(self, why: str) -> None:
        """Fetch and upload, one by one, what the Hub does not copy. Raises HubError where that was all there was."""
        remote, copies = self.plan.remote, self.copied
        assert remote is not None
        self._refused = True
        sizes = [remote.entries[name].size for name in copies]
        limit, needed = self.plan.max_disk, max(sizes) + self.plan.kept + index_bytes(sizes)
        if limit is not None and needed > limit:
            raise OutputError(
                f"the Hub does not copy from {remote.repository}, and passing its files through takes {needed:,} bytes "
                f"at once; --max-disk allows {limit:,}, allow {needed:,}"
            )
        check_room(self._folder, max(sizes))
        weights = {move.file.name for move in self.plan.moves}
        for number, name in enumerate(copies, 1):
            begin(f"[{number}/{len(copies)}] {name}: passing through, as the Hub does not copy it")
            path = self._fetched(name)
            if name in weights:
                self._upload(name, path, {})
            else:
                self.send(name, path.read_bytes())
            self._drop(name)
        self._repository.notes.append(
            f"the Hub does not copy from {remote.repository} to {self._repository.repo_id} ({why}); "
            f"{len(copies)} untouched files were passed through this machine"
        )

    @property
    def nbytes(self) -> int:
        """Size of everything that the commit puts there."""
        remote, found = self.plan.remote, 0
        for name, operation in self.operations.items():
            if isinstance(operation, Copy):
                assert remote is not None
                found += remote.entries[name].size
            else:
                found += operation.upload_info.size
        return found

    def digests(self) -> dict[str, str]:
        """SHA-256 of every published weights file."""
        found = {}
        for file in self.merge.files:
            operation = self.operations[file.name]
            found[file.name] = operation.digest if isinstance(operation, Copy) else operation.upload_info.sha256.hex()
        return found

    def _copy(self, name: str) -> Copy:
        remote = self.plan.remote
        assert remote is not None
        source = remote.prefix + name
        return Copy(name, source, remote.repository, remote.commit, remote.entries[name].blob)

    def _tidy(self) -> None:
        """Of files of the base that an earlier run fetched, keep those that come next, whole or in part."""
        pending = (move for move in self.plan.moves if move.file.name not in self.operations)
        remote, first = self.plan.remote, next(pending, None)
        wanted = {} if remote is None or first is None else {n: remote.entries[n].blob for n in first.sources}
        paths = {self._local(name) for name in wanted}
        for path in (self._folder / BASE).rglob("*"):
            if path.is_file() and path not in paths and not any(blob in path.name for blob in wanted.values()):
                path.unlink()

    def _do(self, move: Move, writer: Writer, title: str) -> None:
        """One file: fetched, merged, uploaded, deleted."""
        file, name = move.file, move.file.name
        if move.way == "send":
            begin(f"{title}: uploading")
            self._upload(name, base_path(self.merge, name), {})
            return
        moved: dict[Path, Path] = {}
        for source in move.sources:
            begin(f"{title}: fetching" + ("" if source == name else f" {source}"))
            moved[base_path(self.merge, source)] = self._fetched(source)
        work = self._folder / MERGING
        path = work / name
        begin(f"{title}: merging")
        try:
            work.mkdir(exist_ok=True)
            if move.way == "change":
                # From here on it is no file of the base, and must not be taken for one after a crash.
                moved[base_path(self.merge, name)].replace(path)
                self._drop(name)
                result = writer.change(file, path, base_path(self.merge, name))
            else:
                path.unlink(missing_ok=True)
                result = writer.write(file, FolderSink(work), moved)
        except OSError as problem:
            raise _not_written(path, problem) from problem
        for source in move.drop:
            self._drop(source)
        begin(f"{title}: uploading")
        self._upload(name, path, result.survival)
        path.unlink()

    def _upload(self, name: str, path: Path, survival: Mapping[str, Survival]) -> None:
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, path)
        self._repository.upload(operation)
        if not client.is_large(operation):  # so small that it goes with the commit itself
            self.send(name, path.read_bytes())
        else:
            try:
                self._journal.add(name, operation.upload_info, survival)
            except OSError as problem:
                raise _not_written(self._folder / JOURNAL, problem) from problem
            self.operations[name] = operation
        self._survival[name] = survival

    def _send(self, contents: Mapping[str, Path | bytes]) -> None:
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        if additions:
            self._repository.upload(*additions)
        self.operations |= {addition.path_in_repo: addition for addition in additions}

    def _local(self, name: str) -> Path:
        remote = self.plan.remote
        assert remote is not None
        return self._folder / BASE / (remote.prefix + name)

    def _drop(self, name: str) -> None:
        self._here.discard(name)
        self._local(name).unlink(missing_ok=True)

    def _fetched(self, name: str) -> Path:
        """A file of the base on this disk, and nowhere else; held against the hash that the Hub lists."""
        from huggingface_hub import hf_hub_download

        remote, path = self.plan.remote, self._local(name)
        assert remote is not None
        if name in self._here:
            return path

        def run(again: bool) -> None:
            hf_hub_download(
                remote.repository,
                remote.prefix + name,
                revision=remote.commit,
                local_dir=self._folder / BASE,
                force_download=again,
                library_name=client.LIBRARY,
            )

        for again in (False, True):
            try:
                retried(lambda: run(again), remote.repository, f"fetching {name}")  # noqa: B023  called at once
            except HubError as problem:
                if errno_of(problem.__cause__) in _DISK:
                    raise _not_written(path, problem.__cause__) from problem.__cause__
                raise
            if is_sound(path, remote.entries[name]):
                # The plan was made from a header that came in a range, without a hash.
                header = next((one for one in self.merge.base.files if one.path.name == name), None)
                if header is not None and header_of(path).encoded != header.encoded:
                    raise remote.damaged([name])
                self._here.add(name)
                return path
            path.unlink()
        raise HubError(
            f"{remote.repository}: {name} came twice with other bytes than the Hub lists; run the same command again "
            "later"
        )


def _not_written(path: Path, problem: BaseException | None) -> OutputError:
    why = os.strerror(errno_of(problem) or errno.EIO)
    return OutputError(f"{path}: writing failed: {why}; make room, or work elsewhere with --cache-dir")
