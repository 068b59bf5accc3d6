"""A folder that comes together beside its destination, file by file, and outlasts the process that makes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._checkpoint import sha256
from fossil_export.errors import FossilExportError, OutputError, failed
from fossil_export.writing import _staging as staging
from fossil_export.writing._journal import Journal
from fossil_export.writing._place import Assembly
from fossil_export.writing._summed import SummedFile
from fossil_export.writing._taking import Held, join, parts_of, take


@dataclass(frozen=True)
class FolderPlace:
    """A folder on this machine, or one that several machines share (`Place`)."""

    output: Path

    @property
    def name(self) -> str:
        return str(self.output)

    def check(self, inputs: list[Path], overwrite: bool, names: Sequence[str] = ()) -> None:
        staging.check_destination(self.output, inputs, overwrite)

    def is_begun(self) -> bool:
        return os.path.lexists(parts_of(self.output))

    @contextmanager
    def assemble(
        self, digest: str, about: Mapping[str, str], *, overwrite: bool = False, shared: bool = False
    ) -> Iterator[Assembly]:
        output = self.output
        made = staging.make_parents(output.parent)
        held: Held | None = None
        keep = shared
        try:
            try:
                with suppress(FileNotFoundError):
                    output.lstat()  # a name too long is told before the work
                staging.give_back(output)
                held = join(output, digest, about) if shared else take(output, digest, about)
                assembly = FolderAssembly(output, held, overwrite)
                assembly.clear(alone=not shared)
            except OSError as problem:
                raise staging.unwritable(output, problem) from problem
            try:
                yield assembly
            except Exception:
                raise
            except BaseException:  # an interruption
                keep = keep or assembly.holds_any()
                raise
            if not assembly.is_published:
                keep = True
                return
            keep, made = False, []
            staging.sync_name(output)
        finally:
            if held is not None:
                if not keep:
                    _remove(held.folder)
                os.close(held.lock)
            if not keep:
                staging.remove_empty(made)


def _remove_unknown(result: Path, wanted: Container[str]) -> None:
    """Remove what nobody knows of: of a run that was killed after it had published, the folder that was replaced."""
    for root, folders, files in os.walk(result, topdown=False):
        for name in (*files, *folders):
            path = Path(root, name)
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # it holds something
                    path.rmdir()
            elif path.relative_to(result).as_posix() not in wanted:
                path.unlink()


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # interrupted in the middle of it
        shutil.rmtree(folder, ignore_errors=True)
        raise


class FolderAssembly:
    """See `Assembly`."""

    def __init__(self, output: Path, held: Held, overwrite: bool) -> None:
        self.replaced = held.replaced
        self.is_published = False
        self._output, self._overwrite = output, overwrite
        self._journal = Journal(held.folder)
        self._sums: dict[str, int] = {}
        self._put: set[str] = set()

    def clear(self, alone: bool) -> None:
        self._journal.clear(alone)

    def create(self, name: str, size: int, hash: bool = False) -> SummedFile:  # noqa: A002
        def finished(sums: int) -> None:
            self._sums[name] = sums

        while True:
            path = self._journal.new_name()
            try:
                file = SummedFile(path, self._journal.result / name, size, finished)
            except FileNotFoundError:
                if not self._journal.path.is_dir():
                    raise
                continue
            if file.is_there():
                return file
            file.close(done=False)  # another process took it for a dead one's before it was held, and removed it

    def put(self, contents: Mapping[str, bytes | Path]) -> None:
        for name, content in contents.items():
            target, new = self._journal.result / name, self._journal.new_name(small=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                new.write_bytes(content)
            else:
                shutil.copyfile(content, new)
            new.replace(target)
            self._put.add(name)

    def sha256(self, name: str) -> str:
        return sha256(self._journal.result / name)

    def notes(self) -> dict[str, dict[str, Any]]:
        try:
            return self._journal.notes()
        except OSError as problem:
            raise self.failed(problem) from problem

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        self._journal.add(name, self._sums[name], about)

    def holds_any(self) -> bool:
        """Whether something is here that the next run can use."""
        with suppress(OSError):
            return bool(self._journal.notes())
        return False

    def check_room(self, needed: int) -> None:
        try:
            staging.check_room(self._output, needed)
        except OSError as problem:
            raise staging.unwritable(self._output, problem) from problem

    def failed(self, problem: OSError) -> FossilExportError:
        return OutputError(failed(self._output, problem, self._journal.path))

    def publish(self) -> None:
        try:
            wanted = {*self._journal.notes(), *self._put}
            _remove_unknown(self._journal.result, wanted)
            staging.sync_tree(self._journal.result)
            # Whoever still writes a file of it finds no place for it, and puts nothing into the finished folder.
            staging.publish(self._journal.result, self._output, self._overwrite)
        except OSError as problem:
            raise staging.unplaced(self._output, problem) from problem
        self.is_published = True
