"""What a plan has to do, file by file, in bytes, elements and requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.merging._layout import FilePlan, TensorPlan
from fossil_export.merging._plan import MergePlan

RANGE = 4 << 20
"""Bytes of a request that reads from an object store."""

PARTS = (8 << 20, 16 << 20, 32 << 20, 64 << 20)
"""Bytes of a request that writes: the first that makes no more than `MAX_PARTS` of a file."""

MAX_PARTS = 10_000
"""Of one object: S3's bound."""

SMALL = 3
"""Small files of a base that planning reads: the index, config.json and one more."""


@dataclass(frozen=True)
class FileWork:
    """One file of the result.

    `read` and `trained` are the bytes read of the base and of the adapters, `copied` those of `written` that nothing is
    computed for; `elements` are those that are computed, by kind ("tile-64 BF16"); `ranges` is the number of requests
    that read the base: its blocks, and two that ask whether the file is still the same.
    """

    name: str
    written: int
    read: int
    trained: int
    copied: int
    ranges: int
    elements: Mapping[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """Requests that write the file to an object store: its parts, and the two around them."""
        part = next((part for part in PARTS if part * MAX_PARTS >= self.written), PARTS[-1])
        return -(-self.written // part) + 2


def work_of(plan: MergePlan) -> list[FileWork]:
    """The work of each file of a plan that computes on floats (not of one that quantizes again)."""
    return [_file(file) for file in plan.files]


def _file(file: FilePlan) -> FileWork:
    elements: Counter[str] = Counter()
    stored: list[TensorInfo] = []
    trained = copied = 0
    for tensor, _ in file.tensors:
        assert tensor.encodes is None, "a plan that quantizes again is not in the model"
        if tensor.owner is None:
            stored += tensor.source.coding.stored if tensor.source.coding is not None else [tensor.source]
        for info in tensor.brought:
            trained += info.nbytes
        for change in tensor.changes:
            trained += sum(info.nbytes for info in change.trained.tensors.values())
        kind = kind_of(tensor)
        if kind == "copy":
            copied += tensor.nbytes
        else:
            elements[kind] += element_count(tensor.shape)
    read, ranges = sum(info.nbytes for info in stored), 2 + sum(-(-length // RANGE) for length in _runs(stored))
    return FileWork(file.name, file.size, read, trained, copied, ranges, dict(elements))


def kind_of(tensor: TensorPlan) -> str:
    """What is done to its elements, and in which dtype they are stored: "copy", "decode F8_E4M3", "lora-16 BF16"."""
    coding = tensor.source.coding
    dtype = tensor.source.dtype if coding is None else coding.stored[0].dtype
    if tensor.changes:
        return f"{' + '.join(_method(change.trained) for change in tensor.changes)} {dtype}"
    if coding is not None:
        return f"decode {dtype}"
    return "copy" if tensor.dtype == tensor.source.dtype else f"cast {dtype}"


def _method(trained: Any) -> str:
    rank = trained.numbers.get("r") if "r" in trained.numbers else min(min(t.shape) for t in trained.tensors.values())
    return f"{trained.method}-{rank}"


def _runs(stored: Sequence[TensorInfo]) -> Iterator[int]:
    """Lengths of the ranges without a gap that tensors lie in."""
    spans = sorted((str(info.path), info.offset or 0, info.nbytes) for info in stored if info.nbytes)
    begin = end = 0
    last = ""
    for path, offset, nbytes in spans:
        if path == last and offset == end:
            end += nbytes
            continue
        if end > begin:
            yield end - begin
        last, begin, end = path, offset, offset + nbytes
    if end > begin:
        yield end - begin


def planning_requests(plan: MergePlan) -> int:
    """Requests that a plan needs of a base that is elsewhere: two a file (the length of its header, then the header to
    the byte), its listing at a commit (two), and its small files."""
    return 2 * len(plan.base.files) + 2 + SMALL
