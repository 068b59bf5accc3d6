"""A merge in parts: several processes, on one machine or many that share a folder, write files of one result."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export._progress import Shown, begin, reporting
from fossil_export._shown import line, readable_bytes, table
from fossil_export.errors import MergeError, OutputError, failed, listed
from fossil_export.merging._assembling import beside, by_name, merging, prepare, results_in, write_files
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._merge import MergeResult, conclude, peak_memory, result_of
from fossil_export.merging._plan import MergePlan
from fossil_export.storage import fetch

Part = tuple[int, int]
"""(3, 16): the third of sixteen."""


@dataclass(frozen=True)
class PartResult:
    """A finished part of a merge.

    Attributes:
        output: Where the merged model will be.
        part: Which part it is: "3/16", or its files.
        files: Its files by name.
        resumed: How many of them were finished before this call.
        missing: The plan's files that no part has finished yet.
        nbytes: Size in bytes of what was written.
        seconds: Wall time.
        peak_memory: The process's largest resident size, in bytes.
        warnings: Lines that the user should see.
    """

    output: Path | str
    part: str
    files: tuple[str, ...]
    resumed: int
    missing: tuple[str, ...]
    nbytes: int
    seconds: float
    peak_memory: int
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return line(
            "PartResult",
            f"{self.part} of {self.output}: {len(self.files)} files, {self.nbytes:,} bytes in "
            f"{self.seconds:.1f} s; {len(self.missing)} files are missing",
        )

    def _repr_html_(self) -> str:
        rows = [
            ("part", self.part),
            ("of", self.output),
            ("files", f"{len(self.files)}, of which {self.resumed} were there already"),
            ("written", f"{readable_bytes(self.nbytes)} in {self.seconds:.1f} s"),
            (
                "missing",
                f"{len(self.missing)} files of other parts" if self.missing else "nothing: finish_merge is next",
            ),
        ]
        return table("Part of a merge", rows, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "output": str(self.output),
            "part": self.part,
            "files": list(self.files),
            "resumed": self.resumed,
            "missing": list(self.missing),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class PartPlan:
    """What a part has to write."""

    part: str
    files: tuple[FilePlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The part as `--dry-run --json` prints it."""
        files = [{"file": file.name, "bytes": file.size, "tensors": len(file.tensors)} for file in self.files]
        return {"part": self.part, "files": files, "bytes": self.nbytes}


def plan_part(plan: MergePlan, part: Part | Collection[str]) -> PartPlan:
    """The files of a part; they are final if the plan is settled. Raises MergeError for a part that there is not."""
    if isinstance(part, tuple) and len(part) == 2 and all(isinstance(one, int) for one in part):
        number, count = int(part[0]), int(part[1])
        if not 1 <= number <= count:
            raise MergeError(f"part is {number}/{count}; parts are counted from 1, as in 1/16 to 16/16")
        # Parts beyond the number of files are empty, however many there are.
        parts = division(plan, min(count, len(plan.files)))
        return PartPlan(f"{number}/{count}", tuple(parts[number - 1]) if number <= len(parts) else ())
    if isinstance(part, str):
        part = (part,)
    files = by_name(plan, (str(name) for name in part))
    return PartPlan(listed([file.name for file in files]), tuple(files))


def division(plan: MergePlan, count: int) -> list[list[FilePlan]]:
    """The files of a plan in `count` parts of about the same size, always the same."""
    import heapq

    loads = [(0, number) for number in range(count)]
    found: list[list[FilePlan]] = [[] for _ in range(count)]
    for file in sorted(plan.files, key=lambda file: (-file.size, file.name)):
        load, number = heapq.heappop(loads)
        found[number].append(file)
        heapq.heappush(loads, (load + file.size, number))
    order = {file.name: number for number, file in enumerate(plan.files)}
    return [sorted(files, key=lambda file: order[file.name]) for files in found]


@reporting
def merge_part(
    plan: MergePlan,
    output: str | Path,
    part: Part | Collection[str],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002  named as the command's option
    progress: Shown = False,
) -> PartResult:
    """Write one part of a merge that several processes or machines share.

    Parts may run in any order and at the same time, on machines that share the folder, and again: a file that is
    finished is not written twice. All parts must have the same arguments. Nothing is seen at `output` before
    `finish_merge`.

    Args:
        plan: What `plan_merge` returned.
        output: Folder to write, or its address in an object store ("s3://bucket/name"). It must not exist, unless
            `overwrite`.
        part: (3, 16) for the third of sixteen parts of about the same size, or names of files of the plan.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        PartResult: `files` of this part by name, `missing` (files of the plan that no part has finished), `nbytes`
            written, `resumed`, `seconds`, `warnings`, and `to_dict()`.

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
        >>> plan = fossil_export.plan_merge("my-adapter")  # doctest: +SKIP
        >>> fossil_export.merge_part(plan, "/shared/merged", (3, 16))  # doctest: +SKIP
    """
    started = time.perf_counter()
    ready = prepare(plan, output, device, overwrite, whole=False)
    plan, place = ready.plan, ready.place
    chosen = plan_part(plan, part)
    files = chosen.files
    fetch(*plan.needed_for(files))
    with place.assemble(ready.digest.digest, ready.digest.about, overwrite=overwrite, shared=True) as assembly:
        try:
            done = results_in(plan, assembly)
            left = [file for file in files if file.name not in done]
            assembly.check_room(sum(file.size for file in left))
            step = merging(files, done, f"merging part {chosen.part}")
            write_files(plan, left, assembly, device=device, hash=hash, progress=step, part=chosen.part)
            done = results_in(plan, assembly)
        except OSError as problem:
            plan.check()
            raise assembly.failed(problem) from problem
    return PartResult(
        output=place.output,
        part=chosen.part,
        files=tuple(file.name for file in files),
        resumed=len(files) - len(left),
        missing=tuple(file.name for file in plan.files if file.name not in done),
        nbytes=sum(file.size for file in left),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        warnings=plan.warnings,
    )


@reporting
def finish_merge(
    plan: MergePlan,
    output: str | Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002
    progress: Shown = False,
) -> MergeResult:
    """Publish a merge of which all parts are written.

    Writes what goes beside the weights, and puts the folder in place. Arguments are as for the parts.

    Args:
        plan: What `plan_merge` returned.
        output: Folder to write, or its address in an object store ("s3://bucket/name"). It must not exist, unless
            `overwrite`.
        device: Where to compute: "cpu" (default), "cuda", "cuda:1". The result is the same.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        MergeResult: `output` (path or address), `survival` (by tensor, how much of the update rounding left),
            `seconds`, `peak_memory` (bytes), `resumed` (files taken up), `warnings` (lines to show), `plan`, and
            `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Parts are missing; it names them.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The parts that are there are of other inputs or another version.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_merge("my-adapter")  # doctest: +SKIP
        >>> fossil_export.finish_merge(plan, "/shared/merged")  # doctest: +SKIP
    """
    started = time.perf_counter()
    ready = prepare(plan, output, device, overwrite, whole=False)
    plan, place = ready.plan, ready.place
    try:
        is_begun = place.is_begun()
    except OSError as problem:
        raise OutputError(failed(place.name, problem, Path(place.name))) from problem
    if not is_begun:  # an end that comes too early begins nothing, which would stay
        raise MergeError(f"{place.name}: {_missing(plan, (), {})}")
    with place.assemble(ready.digest.digest, ready.digest.about, overwrite=overwrite, shared=True) as assembly:
        try:
            done = results_in(plan, assembly)
            if len(done) < len(plan.files):
                raise MergeError(f"{place.name}: {_missing(plan, done, assembly.notes())}")
            begin("finishing")
            assembly.check_room(beside(plan))
            finished = conclude(plan, done.values(), assembly, hash)
        except OSError as problem:
            plan.check()
            raise assembly.failed(problem) from problem
        assembly.publish()
    return result_of(ready, finished, started, resumed=len(done))


def _missing(plan: MergePlan, done: Collection[str], notes: Mapping[str, Mapping[str, Any]]) -> str:
    """What is missing, by file and, if all parts so far were of one number, by part."""
    left = [file.name for file in plan.files if file.name not in done]
    counts = {str(note["part"]).rpartition("/")[2] for name, note in notes.items() if name in done and "part" in note}
    if not done:
        return "no part is finished yet; run all parts (--part 1/N … N/N), then finish"
    what = f"{listed(left)} of {len(plan.files)} files {'is' if len(left) == 1 else 'are'} missing"
    if len(counts) != 1 or not (count := counts.pop()).isdecimal():
        return f"{what}; run the parts that have them, then finish"
    parts = division(plan, max(1, min(int(count), len(plan.files))))
    wanted = [f"{number}/{count}" for number, files in enumerate(parts, 1) if {one.name for one in files} & {*left}]
    return f"{what}; run --part {listed(wanted, 20)}, then finish"
