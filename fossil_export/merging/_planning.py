"""How a plan is made: names, shapes, ties, layout and config, decided from headers before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._log import timed
from fossil_export._progress import Shown, begin, counted, reporting
from fossil_export._spellings import chosen, expected, parse_size
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._companions import QUANTIZATION_FILES, TOKENIZER_FILES, companions
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, FLOATS
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.checkpoints._stamp import Stamp, stamps_of
from fossil_export.errors import CheckpointError, MergeError, listed
from fossil_export.merging._config import difference, edited_config
from fossil_export.merging._given import AnyGiven, loaded
from fossil_export.merging._layout import TensorPlan, lay_out
from fossil_export.merging._look import look
from fossil_export.merging._place import place
from fossil_export.merging._placement import Places, together
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._quantized import refuse_casting
from fossil_export.merging._replication import replicated
from fossil_export.merging._requantize import LEAST, as_stored, refuse_added, stored_plans
from fossil_export.merging._seen_weights import with_tensors
from fossil_export.merging._ties import are_equal
from fossil_export.merging._trained_on import seen_base
from fossil_export.merging._whole import unlike_its_config
from fossil_export.storage import Origin, fetch, find_origin, is_path, pinned

if TYPE_CHECKING:
    import torch

    from fossil_export.checkpoints.quantized._trained_on import TrainedOn


@reporting
def plan_merge(
    adapter: AnyGiven,
    base: str | Path | Origin | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
    requantize: bool = False,
    min_survival: float = LEAST,
    trained_on: str | Mapping[str, Any] | TrainedOn = "auto",
    into: str = "trained",
    progress: Shown = False,
) -> MergePlan:
    """Decide how an adapter is merged into its base; only headers and configs are read.

    Of a base on the Hub only headers are read, by ranges. Nothing is written.

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
        requantize: True keeps a quantized base's format; False (default) dequantizes it to full precision.
        min_survival: With `requantize`: the share of the update, from 0 to 1, that must be left. Less is a MergeError.
        trained_on: How the base was quantized while the adapter was trained (QLoRA): "nf4", "fp4", "int8", "fp8",
            "unquantized", the settings of a BitsAndBytesConfig as a dict, or "auto" (default): what the adapter's files
            say.
        into: "trained" (default) adds the updates to the base as training saw it, "original" to its stored weights.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        MergePlan: `files` to be written and their `nbytes`, `tensors` with the `action` of each, `warnings` (lines to
            show), `config_edits`, and `to_dict()`. `run_merge` carries it out.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.plan_merge("my-adapter")  # doctest: +SKIP
        >>> plan.nbytes, plan.count("merge")  # doctest: +SKIP
        (2471645608, 112)
    """
    begin("planning")
    adapters, found_weights = loaded(adapter, weights)
    wanted = chosen(dtype, ("auto", *BY_TORCH_NAME))
    if wanted is None:
        raise MergeError(f"dtype is {str(dtype)!r}, {expected(('auto', *BY_TORCH_NAME))}")
    dtype = wanted
    if not 0 <= min_survival <= 1:
        raise MergeError(f"min_survival is {min_survival!r}, expected a share from 0 to 1")
    if requantize and dtype != "auto":
        raise MergeError("--requantize keeps the base's dtypes; leave out --dtype")
    bases = list(dict.fromkeys(one.base_model for one in adapters if one.base_model))
    if base is None and len(bases) > 1:
        shown = listed(list(dict.fromkeys(one.base_shown for one in adapters if one.base_shown)))
        raise MergeError(f"the adapters name different bases ({shown}); name the one to merge into with --base")
    named = [one for one in adapters if one.base_model]
    pinned_to = [one for one in named if one.base_revision and not is_path(str(one.base_model))]
    revisions = list(dict.fromkeys(str(one.base_revision) for one in pinned_to))
    if base is None and len(revisions) > 1:
        raise MergeError(
            f"the adapters name different revisions of {named[0].base_shown} ({listed(revisions)}); name the one to "
            "merge into with --base"
        )
    first = next((one for one in named if one.base_revision), [*named, *adapters][0])
    found = base if isinstance(base, Origin) else find_base(first, base)
    opened = found.checkpoint()
    with found.by_name():
        seen = seen_base(adapters, opened, trained_on, into, base_is_named=base is None or found.name in bases)
    asked = MergePlan(
        adapters=adapters,
        weights=found_weights,
        base=with_tensors(opened, seen.tensors) if into == "trained" and seen.tensors else opened,
        base_name=found.name,
        base_revision=found.revision or (first.base_revision if base is None else None),
        base_branch=found.branch,
        dtype=dtype,
        max_shard_size=parse_size(max_shard_size, "max_shard_size", MergeError) if max_shard_size is not None else None,
        files=(),
        index=None,
        config=None,
        config_edits={},
        companions={},
        left_behind=(),
        warnings=(),
        notes=(
            *(note for one in adapters for note in one.notes),
            *found.notes,
            *_doubts(adapters, found_weights, bases),
        ),
        undecided=(),
        stamps={},
        min_survival=min_survival if requantize else None,
        seen=seen,
        into=into,
    )
    with timed("planned %d tensors of %d files", len(asked.base.tensors), len(asked.base.files)):
        return planned(asked, dtype, [None] * len(adapters))


def _doubts(adapters: Sequence[Adapter], weights: Sequence[float], bases: list[str]) -> tuple[str, ...]:
    """What may be a slip in a list of adapters, of which every one can be merged."""
    if len(adapters) == 1:
        return ()
    found = []
    files = [tuple(path.absolute() for path in one.files) for one in adapters]
    for number, adapter in enumerate(adapters):
        if files.index(files[number]) == number and (times := files.count(files[number])) > 1:
            found.append(f"{adapter.name}: is given {times} times, and its updates are added {times} times")
        if weights[number] == 0 and any(weights):
            found.append(f"{adapter.name}: its weight is 0, so that nothing of its updates is in the merged model")
    if len(bases) > 1:
        found.append(f"the adapters were trained on different bases ({listed(bases)}); updates fit their own best")
    return tuple(found)


@reporting
def settled(plan: MergePlan, *, progress: Shown = False) -> MergePlan:
    """Decide what a plan left open: whether a head that came with the adapter is still the embedding.

    Fetches the adapters if they are needed for that, and reads both tensors of each pair in `plan.undecided`.
    `run_merge` and the other functions that take a plan do it themselves. Heads that are still the embedding stay tied
    to it, and are no tensors of the result.

    Args:
        plan: What `plan_merge` returned.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        MergePlan: The plan with nothing undecided, as `fossil_export.merging.merge_file` wants it. Most plans are
            settled, and are returned as they are; the same files give the same plan, on every machine.

    Raises:
        FossilExportError: If the adapter cannot be fetched or read.

    Example:
        >>> import fossil_export
        >>> plan = fossil_export.settled(fossil_export.plan_merge("my-adapter"))  # doctest: +SKIP
    """
    if not any(plan.undecided):
        return plan
    fetch(*(adapter.needed for adapter in plan.adapters))
    begin("comparing heads with embeddings")
    base = replicated(plan.adapters, plan.base)
    tied = [are_equal(adapter, base, place(adapter, base)) for adapter in plan.adapters]
    return planned(plan, plan.dtype, tied)


def with_dtype(plan: MergePlan, dtype: str) -> MergePlan:
    """The same merge with all floating-point tensors in another dtype."""
    return planned(plan, dtype, [None] * len(plan.adapters))


def planned(asked: MergePlan, dtype: str, tied: Sequence[bool | None]) -> MergePlan:
    """The whole plan for what was `asked`; `tied` is by adapter, as `place` has it."""
    base, adapters = replicated(asked.adapters, asked.base), asked.adapters
    refuse_casting(base, dtype)
    placements = [place(adapter, base, equal) for adapter, equal in zip(adapters, tied, strict=True)]
    places = together(adapters, placements, asked.weights)
    every = counted(base.tensors.items(), "planning", len(base.tensors), "tensors")
    plans = {name: _tensor_plan(name, info, places, dtype) for name, info in every}
    stored = base if asked.min_survival is None else as_stored(base, asked.base)
    if stored is base:
        by_file = {one.output_name: [plans[info.name] for info in one.tensors] for one in base.files}
    else:
        by_file = stored_plans(base, plans)
    new = [_tensor_plan(name, None, places, dtype) for name in places.added]
    if stored is not base:
        refuse_added(base, new)
    by_file[base.files[-1].output_name] += new
    if any(header.derived for header in base.files):  # a file may have held nothing but layers that are left out
        by_file = {name: tensors for name, tensors in by_file.items() if tensors}
    files, index = lay_out(stored, by_file, asked.max_shard_size)

    # What is written over is the config as it is stored.
    before = (asked.base.quantized.stored if asked.base.quantized else asked.base).config or {}
    config_edits, config = _config(stored, before, places, dtype)
    held = {name: plan.shape for name, plan in plans.items()} | {
        tensor.name: tensor.shape for tensors in by_file.values() for tensor in tensors if tensor.added
    }
    if unlike := next(unlike_its_config(base), None):
        raise MergeError(
            f"{base.location}: {unlike}; no loader has this model as it was saved; fetch it again, or mend config.json"
        )
    if wrong := list(look(adapters, base, held, {**(base.config or {}), **config_edits})):
        raise MergeError(
            f"{base.location}: the merged model would not be what was trained: {wrong[0]}"
            f"{f', and {len(wrong) - 1} more' if wrong[1:] else ''}; save the base again with today's transformers "
            "and the config that was trained with, and merge into that"
        )
    keep, left = companions(base.home) if base.folder is not None else ({}, [])
    if base.quantized is not None and stored is base:  # its weights are no longer
        left += [name for name in QUANTIZATION_FILES if keep.pop(name, None)]
    # Of several tokenizers, that of the resized vocabulary.
    first = sorted(zip(adapters, placements, strict=True), key=lambda pair: pair[1].vocab_size is None)
    with_tokenizer = [adapter for adapter, _ in first if adapter.tokenizer()]
    if with_tokenizer:
        # The model was trained with the tokenizer and chat template that lie beside the shards.
        tokenizer = with_tokenizer[0].tokenizer()
        keep = {name: path for name, path in keep.items() if name not in TOKENIZER_FILES} | tokenizer
    names = {file.name for file in files} | ({index[0]} if index else set())
    keep = {name: path for name, path in keep.items() if name not in names}
    read = {header.path.name for header in base.files}
    read |= {base.index_path.name} if base.index_path is not None else set()
    return replace(
        asked,
        dtype=dtype,
        files=files,
        index=index,
        config=config,
        config_edits=config_edits,
        companions=keep,
        left_behind=tuple(name for name in left if name not in names | read),
        warnings=(
            *asked.notes,
            *base.notes,
            *places.warnings,
            *asked.seen.warnings,
            *_other_tokenizers(with_tokenizer),
        ),
        undecided=places.undecided,
        stamps=_stamps(adapters, base, keep.values()),
    )


def _other_tokenizers(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """What to say of tokenizers that are not the first adapter's, which is taken; told by the names and sizes of their
    files."""
    sizes = [{name: one.home.size(name) for name in one.tokenizer()} for one in adapters]
    others = [one.name for one, found in zip(adapters, sizes, strict=True) if found != sizes[0]]
    if not others:
        return ()
    return (f"{adapters[0].name}: its tokenizer is taken; {listed(others)} came with another one",)


def _stamps(adapters: Sequence[Adapter], base: Checkpoint, companions: Iterable[Path]) -> dict[Path, Stamp]:
    """Of everything that goes into the result and is on this machine."""
    headers = [*base.files, *(header for adapter in adapters for header in adapter.headers)]
    found = {header.path: header.stamp for header in headers if header.stamp is not None}
    small = [*companions, *(path for adapter in adapters for path in adapter.files)]
    small += [base.index_path] if base.index_path is not None else []
    small += [base.folder / "config.json"] if base.folder is not None and base.config is not None else []
    known = {path: stamp for adapter in adapters for path, stamp in adapter.stamps.items()}
    return {**stamps_of(small), **base.stamps, **known, **found}


def find_base(adapter: Adapter, base: str | Path | None = None) -> Origin:
    """Where `base` lies, by default the model that `adapter` names, at its revision; raises CheckpointError."""
    if base is None and not adapter.base_model:
        raise MergeError(f"{adapter.path}: does not name its base model; name it with --base")
    own = str(adapter.base_model)
    if base is None:
        base = own if is_path(own) else pinned(own, adapter.base_revision)
    return find_origin(base, CheckpointError, "base model")


def _tensor_plan(name: str, info: TensorInfo | None, places: Places, dtype: str) -> TensorPlan:
    """The plan of one tensor; `info` is the base's tensor of that name, if it has one."""
    source, owner = places.sources.get(name, (info, None))
    assert source is not None, name
    pieces = places.pieces.get(name, ())
    for piece in pieces:
        piece.check(source)
    own = stored_dtype(info if info is not None else source)
    target = BY_TORCH_NAME[dtype] if dtype != "auto" and own in FLOATS else own
    return TensorPlan(
        name=name,
        dtype=target,
        shape=source.shape,
        source=source,
        owner=owner,
        changes=places.changes.get(name, ()),
        pieces=pieces,
        added=info is None,
    )


def stored_dtype(info: TensorInfo) -> str:
    """That of the file, if it is one of floats: what training saw may have been cast to another one."""
    stored = info.coding.stored[0].dtype if info.coding is not None else info.dtype
    return stored if stored in FLOATS else info.dtype


def _config(
    base: Checkpoint, before: Mapping[str, Any], places: Places, dtype: str
) -> tuple[dict[str, Any], bytes | None]:
    """The edits of the config, which was another one `before` if the base's layers are repeated ones."""
    if base.config is None:
        needed = [
            what
            for what, is_needed in (("tie_word_embeddings", places.untie), ("vocab_size", places.vocab_size))
            if is_needed
        ]
        # What is undecided may be tied still; this is asked again once that is known.
        if places.vocab_size is not None or (places.untie and not any(places.undecided)):
            raise MergeError(
                f"{base.location}: has no config.json, in which {listed(needed)} must change; "
                "name the model's folder with --base"
            )
        return {}, None
    edited = edited_config(
        base.config,
        untie=places.untie,
        vocab_size=places.vocab_size,
        torch_dtype=None if dtype == "auto" else dtype,
        task_type=places.task_type,
        labels=places.labels,
        architecture=places.architecture,
    )
    edits = difference(before, edited)
    return edits, write_json(edited) if edits else None
