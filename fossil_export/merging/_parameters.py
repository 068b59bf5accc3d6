"""Where the matrices lie of a parameter that a LoRA changes (`target_parameters`): those of all experts in one tensor,
or in the many that transformers makes one of.

Every matrix, or run of rows of one, gets a plain LoRA of its own: its slice of A and B. Source: `ParamWrapper` in
peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.layouts import Matrix, fused_rows, transposed_slice
from fossil_export.errors import MergeError
from fossil_export.merging._brought import REMEDY
from fossil_export.merging._naming import Naming
from fossil_export.models._inventory import Conversion

TRANSPOSED = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
"""Types of models whose experts are (experts, in, out): `is_transposed` in transformers/models."""

_SWAPS = (0, 21)
"""Versions of PEFT from here on are known to ask for that."""

Runs = list[tuple[TensorInfo, int, int]]
"""Stored tensor, first row of it, number of rows: the rows of a parameter (…, width), in order."""


def stored_experts(made: Conversion | None, trained: Trained, base: Checkpoint) -> tuple[tuple[int, ...], Runs] | None:
    """The shape and the runs of a parameter (experts, out, in) that transformers makes of one stored tensor, which may
    be (experts, in, out); None if it makes it in another way.

    Some classes look at the shape first, which the LoRA has too (`Transpose` in transformers/core_model_loading.py).
    """
    if made is None:
        return None
    names = [name for own in made.stored.values() for name in own]
    options = made.operations[0].options if [one.name for one in made.operations] == ["Transpose"] else {}
    if len(names) != 1 or sorted((options.get("dim0", 0), options.get("dim1", 1))) != [1, 2]:
        return None
    info = base.tensors[names[0]]
    made_for = (trained.tensors["B"].shape[0], trained.tensors["A"].shape[1])
    if len(info.shape) != 3:
        return None
    if options.get("check_dims") and info.shape[1:] == made_for:
        return info.shape, [(info, 0, info.shape[0] * info.shape[1])]
    return (info.shape[0], info.shape[2], info.shape[1]), [(info, 0, 0)]


def matrices(
    trained: Trained, shape: tuple[int, ...], runs: Runs, adapter: Adapter, naming: Naming, where: str
) -> Iterator[tuple[str, Trained, Matrix]]:
    """The matrices of a parameter of this `shape`, each with a suffix for its name and the LoRA that changes it.

    Runs without rows are of a tensor that is stored with its experts transposed. `where` names the parameter, for
    messages. Raises MergeError if the LoRA is not made for it.
    """
    down, up = trained.tensors["A"], trained.tensors["B"]
    module = trained.module.rpartition(".")[0]
    for other in trained.numbers["others"]:
        if naming.parameter(f"{module}.{other}") is not None:
            raise MergeError(
                f"{adapter.path}: target_parameters has {other} too, which {module} has and the adapter lacks, so "
                f"which parameter {trained.label} is of cannot be told; train it with its parameters named in full"
            )
    experts = shape[0] if len(shape) == 3 else 1
    rows, width = shape[-2:] if len(shape) in (2, 3) else (0, 0)
    made_for = (trained.numbers["experts"], up.shape[0], down.shape[1])
    plain, swapped = made_for == (experts, rows, width), made_for == (experts, width, rows)
    if not plain and not (swapped and len(shape) == 3 and experts > 1):
        raise MergeError(
            f"{where} {list(shape)} does not fit shard {trained.label} {list(down.shape)} and {list(up.shape)} of "
            f"{adapter.path}: they are made for {made_for[0]} times {list(made_for[1:])}; {REMEDY}"
        )
    if plain and swapped and len(shape) == 3:
        plain = _by_class(trained, adapter, naming, where)
    rank, size = trained.rank, up.shape[1]

    def of_expert(expert: int, first: int, count: int) -> Trained:
        own = {
            "A": slice_of(down, expert * rank * down.shape[1], rank * down.shape[1], (rank, down.shape[1])),
            "B": slice_of(up, first * size, count * size, (count, size)),
        }
        columns = {"B": slice(expert, None, experts)} if experts > 1 else {}
        numbers = {"r": rank, "scale": trained.numbers["scale"]}
        return replace(trained, method="lora", tensors=own, numbers=numbers, columns=columns)

    flipped = not any(count for _, _, count in runs)
    if flipped or not plain:
        if len(runs) != 1 or flipped is not plain or (not flipped and runs[0][0].shape != shape):
            raise MergeError(
                f"{where}: its experts lie transposed, and in parts; save the base again with today's transformers "
                "(save_original_format=False), and merge into that"
            )
        for expert in range(experts):
            yield f"[{expert}]", of_expert(expert, 0, up.shape[0]), transposed_slice(runs[0][0], expert)
        return
    at = 0
    for info, start, count in runs:
        end = at + count
        while at < end:
            expert, first = divmod(at, rows)
            some = min(end - at, rows - first)
            suffix = f"[{expert}, {first}:{first + some}]" if experts > 1 or some < rows else ""
            yield suffix, of_expert(expert, first, some), fused_rows(info, start + count - (end - at), some)
            at += some


def _by_class(trained: Trained, adapter: Adapter, naming: Naming, where: str) -> bool:
    """Whether square matrices lie (out, in), as all do in transformers but for some types."""
    version = str(adapter.config.get("peft_version") or "").split(".")
    recent = len(version) > 1 and all(one.isdigit() for one in version[:2])
    recent = recent and (int(version[0]), int(version[1])) >= _SWAPS
    if naming.known and naming.model.model_type in TRANSPOSED:
        return False
    if naming.known and recent:
        return True
    raise MergeError(
        f"{where}: its matrices are square, so whether shard {trained.label} of {adapter.path} was trained for them or "
        "for their transposes cannot be told of an adapter of an older PEFT, or of a model that transformers does not "
        "know; merge it with the PEFT that it was trained with"
    )
