"""A merge that comes together file by file, in one process or in many: what is common to all ways to do that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fossil_export._progress import Step, begin
from fossil_export.errors import MergeError, OutputError, failed
from fossil_export.merging._digest import PlanDigest, plan_digest
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import settled
from fossil_export.merging._run import FileResult, Writer
from fossil_export.storage import fetch
from fossil_export.writing._place import Assembly, Place, find_place

BESIDE = 1 << 20
"""Bytes kept for config, index and record."""


@dataclass(frozen=True)
class Prepared:
    """A `plan` that is settled and whose files are here, the `place` of its result, and what decides its bytes."""

    plan: MergePlan
    place: Place
    digest: PlanDigest


def prepare(
    plan: MergePlan, output: str | Path, device: str = "cpu", overwrite: bool = False, whole: bool = True
) -> Prepared:
    """Check inputs and output, fetch what is needed and settle the plan; if it is not run as a `whole`, the base's
    weights are left to `storage.fetch(*plan.needed_for(files))`. Raises a FossilExportError."""
    place = find_place(output)
    plan.check()  # first, since an input that is gone has no place to hold the output against
    names = [plan.base_name, *(adapter.name for adapter in plan.adapters)]
    inputs = [plan.base.location, *(adapter.path for adapter in plan.adapters)]
    place.check(inputs, overwrite, [name for name in names if name is not None])
    fetch(*(plan.needed if whole else plan.needed_for(())))
    plan = settled(plan)
    try:
        digest = plan_digest(plan, device)
    except OSError as problem:
        plan.check()
        raise OutputError(failed(place.name, problem, Path(place.name))) from problem
    return Prepared(plan, place, digest)


def results_in(plan: MergePlan, assembly: Assembly) -> dict[str, FileResult]:
    """The files of `plan` that are finished, by name."""
    notes, found = assembly.notes(), {}
    for file in plan.files:
        try:
            result = FileResult.from_dict(notes[file.name])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if (result.name, result.size) == (file.name, file.size):
            found[file.name] = result
    return found


def write_files(
    plan: MergePlan,
    files: Sequence[FilePlan],
    assembly: Assembly,
    *,
    device: str = "cpu",
    hash: bool = False,  # noqa: A002
    progress: Callable[[int], None] = lambda nbytes: None,
    part: str | None = None,
) -> dict[str, FileResult]:
    """Write `files` and note each that is finished, as one of the `part`. Raises what `merge_file` does."""
    found: dict[str, FileResult] = {}
    if not files:
        return found
    with Writer(plan, device, progress) as writer:
        for file in files:
            found[file.name] = result = writer.write(file, assembly, hash=hash)
            assembly.note(file.name, {**result.to_dict(), **({"part": part} if part else {})})
    return found


def merging(files: Sequence[FilePlan], done: Iterable[str], name: str = "merging") -> Step:
    """The step of writing the tensors of `files`, of which some are `done`; headers do not count."""
    sizes = {file.name: sum(tensor.nbytes for tensor, _ in file.tensors) for file in files}
    step = begin(name, sum(sizes.values()), "B")
    if before := sum(sizes.get(name, 0) for name in done):
        step(before)
    return step


def beside(plan: MergePlan) -> int:
    """Bytes of what goes beside the weights, about."""
    return sum(path.stat().st_size for path in plan.companions.values()) + BESIDE


def with_hashes(results: Iterable[FileResult], assembly: Assembly) -> list[FileResult]:
    """The results with the SHA-256 of each file; those that have none are read."""
    results = list(results)
    left = [one for one in results if one.sha256 is None]
    step = begin("reading for SHA-256", sum(one.size for one in left), "B") if left else None
    found = []
    for one in results:
        if one.sha256 is None:
            one = FileResult(one.name, one.size, one.survival, assembly.sha256(one.name))
            if step is not None:
                step(one.size)
        found.append(one)
    return found


def without_hashes(results: Iterable[FileResult]) -> list[FileResult]:
    """The results as they are if nobody asks for hashes."""
    return [FileResult(one.name, one.size, one.survival) for one in results]


def told_replaced(place: Place, assembly: Assembly) -> list[str]:
    """A warning if an unfinished merge of other inputs was thrown away."""
    if not assembly.replaced:
        return []
    return [f"{place.name}: an unfinished merge there was of {', '.join(assembly.replaced)}; it is begun anew"]


def told_resumed(place: Place, plan: MergePlan, resumed: int) -> list[str]:
    """A note if an earlier run had finished some files."""
    if not resumed:
        return []
    files = "1 file is" if resumed == 1 else f"{resumed} files are"
    return [f"{place.name}: taken up where an earlier run was interrupted; {files} of that, of {len(plan.files)}"]


def by_name(plan: MergePlan, names: Iterable[str]) -> list[FilePlan]:
    """Files of `plan`, in its order. Raises MergeError for a name that it does not have."""
    known: Mapping[str, FilePlan] = {file.name: file for file in plan.files}
    wanted = set(names)
    if unknown := sorted(wanted - known.keys()):
        raise MergeError(f"{unknown[0]}: is no file of this merge; these are {', '.join(known)}")
    return [file for file in plan.files if file.name in wanted]
