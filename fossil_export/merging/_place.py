"""Where every tensor of the adapter goes in the base: matched, checked, or refused."""

from __future__ import annotations

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import FLOATS, element_count
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.layouts import Matrix, Order, find_matrix, fused_rows
from fossil_export.errors import MergeError, listed
from fossil_export.merging._brought import (
    REMEDY,
    as_class,
    brought_by,
    refuse_missing,
    refuse_unsaved,
    refuse_untold,
    remedy,
    trained_whole,
)
from fossil_export.merging._change import Piece, weight_numbers
from fossil_export.merging._naming import Naming, exact_names, naming_of
from fossil_export.merging._parameters import matrices, stored_experts
from fossil_export.merging._placement import Placement
from fossil_export.merging._quantized import quantization, quantized, quantized_with, refuse_parts
from fossil_export.merging._replication import refuse_replicated
from fossil_export.merging._rows import place_rows
from fossil_export.merging._ties import part
from fossil_export.merging._vocabulary import (
    check_vocabulary,
    is_classifier,
    is_vocabulary,
    vocabulary_rows,
)
from fossil_export.merging._warnings import warnings_of
from fossil_export.methods import METHODS
from fossil_export.models import Pieces, Unknown, pieces_of


def place(adapter: Adapter, base: Checkpoint, tied: bool | None = None, *, into_floats: bool = True) -> Placement:
    """Give every trained and saved tensor of `adapter` its place in `base`, or raise MergeError naming it.

    Only headers are read. `tied` says what they do not: whether tensors that the base ties and that came with the
    adapter are equal (`ties.are_equal`); without it they are taken as parted, and `Placement.undecided` names them. The
    base's weights must be floats, unless nothing will be added to them (`into_floats` is False).
    """
    refuse_replicated(adapter, base)
    if reason := adapter.unfit.get(str((base.config or {}).get("model_type"))):
        raise MergeError(f"{adapter.path}: its trainer {reason}; fuse it with the trainer")
    naming = naming_of(adapter, base)
    placement = Placement(tied=tied)
    brought = brought_by(adapter, base, naming)
    refuse_untold(adapter, base, naming, brought)
    refuse_unsaved(adapter, base, naming, brought)
    copied = part(naming, adapter, base, brought, placement)
    refuse_missing(adapter, base, naming, brought, copied)
    for parameter, source in copied.items():
        name = _name_for(parameter, naming, base)
        placement.copied[name] = base.tensors[naming.names.whole[source]]
        placement.added.append(name)
    for parameter, info in brought.saved.items():
        _place_saved(parameter, info, adapter, base, naming, placement)
    for parameter, trained in brought.trained.items():
        _place_trained(parameter, trained, adapter, base, naming, placement, into_floats)
    place_rows(adapter, base, naming, brought, placement, into_floats)
    check_vocabulary(adapter, base, naming, placement)
    if placement.added and naming.known and not naming.is_named_by(base.config):
        placement.architecture = naming.model.name
    placement.warnings = tuple(warnings_of(adapter, base, naming, brought))
    return placement


def _name_for(parameter: str, naming: Naming, base: Checkpoint) -> str:
    """The name to store a parameter by that the base lacks. Raises MergeError if there is none."""
    found = naming.names.spelling(parameter)
    if found is None or found in base.tensors:
        raise MergeError(
            f"{base.location}: has no {parameter}, and no file of it can hold that by a name of its own; save the base "
            "again with transformers, and merge into that"
        )
    return found


def _place_saved(
    parameter: str, info: TensorInfo, adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement
) -> None:
    """Put one whole trained tensor in the place of the base's, or beside the base's tensors."""
    module = parameter.rpartition(".")[0]
    if parameter in naming.names.converted:
        _place_pieces(parameter, info, adapter, base, naming, placement)
        return
    target = naming.names.whole.get(parameter) or (parameter if parameter in base.tensors else None)
    old = base.tensors[target] if target is not None else None
    of_tokens = is_vocabulary(parameter, naming, base)
    if target is None or old is None:
        if not naming.model.has(parameter) or _is_beyond(parameter, base, naming):
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location}{as_class(naming)}; "
                f"{quantization(base) or remedy(naming, base)}"
            )
        target = _name_for(parameter, naming, base)
        placement.added.append(target)
        rows = vocabulary_rows(parameter, base, naming)
        if of_tokens and rows is not None and info.shape and rows != info.shape[0]:
            placement.vocab_size = info.shape[0]
    elif old.dtype != info.dtype and not {old.dtype, info.dtype} <= set(FLOATS):
        raise MergeError(
            f"{adapter.path}: saved tensor {info.name} is {info.dtype}, and {target} of {base.location} is "
            f"{old.dtype}; {quantization(base) or REMEDY}"
        )
    elif old.shape[1:] != info.shape[1:] or (old.shape != info.shape and not of_tokens):
        if not trained_whole(info.name, module, adapter) or of_tokens:
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} {list(info.shape)} does not fit {target} {list(old.shape)} "
                f"of {base.location}; {REMEDY}"
            )
    elif of_tokens and old.shape != info.shape:
        placement.vocab_size = info.shape[0]
    if (
        (old is None or old.shape != info.shape)
        and not of_tokens
        and is_classifier(parameter, info, adapter, base, naming)
    ):
        placement.labels = info.shape[0]
    if reason := quantized_with(target, base, hidden=False):
        raise MergeError(
            f"{adapter.path}: saved tensor {info.name} cannot be {target} of {base.location}, which {reason}"
        )
    placement.saved[target] = info


def _is_beyond(parameter: str, base: Checkpoint, naming: Naming) -> bool:
    """Whether the class has a parameter of this kind, but not this one: it has fewer layers, say, or no biases."""
    exact = exact_names(naming.model.name, base) if naming.known and naming.model.shapes is None else None
    if exact is not None:
        return not exact.model.has(parameter)
    parts, within = parameter.split("."), naming.names.modules
    lists = [at for at, part in enumerate(parts) if part.isdigit()]
    return any(".".join(parts[:at]) in within and ".".join(parts[: at + 1]) not in within for at in lists)


def _place_pieces(
    parameter: str, info: TensorInfo, adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement
) -> None:
    """Put a whole trained tensor where the base has its rows: in a part of a tensor, or in several."""
    found = _pieces(parameter, base, naming)
    where = f"{adapter.path}: saved tensor {info.name} {list(info.shape)}"
    if found.shape != info.shape:
        raise MergeError(f"{where} does not fit {parameter} {list(found.shape)} of {base.location}; {REMEDY}")
    order = Order(*found.order) if found.order is not None else None
    width = info.shape[-1] if len(info.shape) > 1 else 1
    at = 0
    for run in found.runs:
        stored, size = base.tensors[run.name], run.count * width
        if stored.dtype != info.dtype and not {stored.dtype, info.dtype} <= set(FLOATS):
            raise MergeError(
                f"{where} is {info.dtype}, and {run.name} of {base.location}, a part of it, is {stored.dtype}; {REMEDY}"
            )
        if stored.dtype in FLOATS:
            refuse_parts(run.name, stored.dtype, base)
        if size == element_count(stored.shape) and order is None:
            placement.saved[run.name] = slice_of(info, at, size, stored.shape)
        else:
            piece = Piece(run.first * width, slice_of(info, at, size, (size,)), order)
            placement.pieces[run.name] = (*placement.pieces.get(run.name, ()), piece)
        at += size


def _place_trained(
    parameter: str,
    trained: Trained,
    adapter: Adapter,
    base: Checkpoint,
    naming: Naming,
    placement: Placement,
    into_floats: bool,
) -> None:
    """Where the weight lies that a shard changes. Raises MergeError for one that it does not fit."""
    if trained.method == "lora_parameter":
        _place_parameter(parameter, trained, adapter, base, naming, placement)
        return
    if parameter in naming.names.converted:
        name, matrix = parameter, _rows(parameter, trained, adapter, base, naming)
    else:
        name = naming.names.whole.get(parameter, parameter)
        if name not in base.tensors:
            spelled = naming.names.spelling(parameter)
            name = spelled if spelled in placement.saved or spelled in placement.copied else name
        brought = placement.saved.get(name) or placement.copied.get(name)
        tensors = base.tensors if brought is None else {**base.tensors, name: brought}
        found = find_matrix(name, tensors, base.config)
        if found is None and name not in tensors:
            raise MergeError(_homeless(name, trained, adapter, base))
        matrix = _checked(found, tensors.get(name), name, trained, base)
    where = f"{base.location}: {name} {list(matrix.stored[0].shape)}"
    dtypes = (matrix.dtype, matrix.stored[0].dtype)
    if into_floats and (others := [dtype for dtype in dtypes if dtype not in FLOATS]):
        raise MergeError(f"{where} is stored as {others[0]}: {quantized(base)}")
    if into_floats and (reason := quantized_with(matrix.stored[0].name, base)):
        raise MergeError(f"{where} {reason}")
    if getattr(METHODS[trained.method], "MASKS_BIAS", False):
        bias = f"{parameter.rpartition('.')[0]}.bias"
        if bias in naming.names or bias in placement.saved:
            raise MergeError(
                f"{base.location}: {bias} is masked too by {trained.label} of {adapter.path}, which is not supported; "
                "merge it with the code that trained it"
            )
    if reason := trained.mismatch(matrix.shape, weight_numbers(matrix, matrix.dtype, name in placement.saved)):
        shapes = " and ".join(str(list(info.shape)) for info in trained.tensors.values())
        raise MergeError(f"{where} does not fit shard {trained.label} {shapes} of {adapter.path}: {reason}; {REMEDY}")
    placement.trained[name] = trained
    placement.into[name] = matrix


def _place_parameter(
    parameter: str, trained: Trained, adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement
) -> None:
    """Where the matrices of a parameter lie, each with its part of what was trained."""
    name, stored = parameter, stored_experts(naming.names.converted.get(parameter), trained, base)
    if stored is not None:
        shape, runs = stored
    elif parameter in naming.names.converted:
        found = _pieces(parameter, base, naming)
        shape, runs = found.shape, [(base.tensors[run.name], run.first, run.count) for run in found.runs]
        if found.order is not None:
            raise MergeError(
                f"{base.location}: the rows of {parameter} lie in another order, and {trained.label} of {adapter.path} "
                "changes it as a whole; save the base in the form of its class, and merge into that"
            )
    else:
        name = naming.names.whole.get(parameter, parameter)
        spelled = naming.names.spelling(parameter) or name
        brought = placement.saved.get(spelled) or placement.copied.get(spelled)
        name = name if name in base.tensors and brought is None else spelled
        info = brought or base.tensors.get(name)
        if info is None:
            raise MergeError(_homeless(name, trained, adapter, base))
        shape, runs = info.shape, [(info, 0, element_count(info.shape[:-1]))]
    where = f"{base.location}: {name}"
    if others := [info.dtype for info, _, _ in runs if info.dtype not in FLOATS]:
        raise MergeError(f"{where} {list(shape)} is stored as {others[0]}: {quantized(base)}")
    if reasons := [reason for info, _, _ in runs if (reason := quantized_with(info.name, base))]:
        raise MergeError(f"{where} {list(shape)} {reasons[0]}")
    for suffix, one, matrix in matrices(trained, shape, runs, adapter, naming, where):
        if suffix and (name in placement.saved or name in placement.copied):
            raise MergeError(f"{where} comes with {adapter.path}, which changes its matrices too; merge it with PEFT")
        placement.trained[name + suffix] = one
        placement.into[name + suffix] = matrix


def _checked(matrix: Matrix | None, weight: TensorInfo | None, name: str, trained: Trained, base: Checkpoint) -> Matrix:
    if matrix is None or 0 in matrix.shape or (weight is not None and not _fits(weight, trained)):
        shape = list(weight.shape) if weight is not None else []
        if weight is not None and weight.dtype not in FLOATS:
            raise MergeError(f"{base.location}: {name} {shape} is stored as {weight.dtype}: {quantized(base)}")
        if trained.dimensions == 2 and len(shape) > 2:
            raise MergeError(
                f"{base.location}: {name} {shape} is the weight of a convolution, and {trained.method} "
                f"({trained.label}) is merged into matrices alone; run the adapter beside the model, with PEFT"
            )
        raise MergeError(
            f"{base.location}: {name} {shape} is no matrix, but the adapter has a shard for it ({trained.label}); "
            f"{REMEDY}"
        )
    return matrix


def _fits(weight: TensorInfo, trained: Trained) -> bool:
    """Whether it has as many dimensions as a parameter that this changes."""
    return len(weight.shape) == trained.dimensions if trained.dimensions is not None else len(weight.shape) > 1


def _homeless(name: str, trained: Trained, adapter: Adapter, base: Checkpoint) -> str:
    """Why a shard has no weight to change, whose module the model has."""
    module = name.removesuffix(".weight")
    beside = sorted(other.rpartition(".")[2] for other in base.tensors if other.rpartition(".")[0] == module)
    where = f"{base.location}: has no {name}, which shard {trained.label} of {adapter.path} changes"
    if set(beside) - {"bias"}:
        return f"{where}, but {listed(beside)}: {quantized(base)}"
    if name.endswith(".bias"):
        return f"{where}, and a merge adds none; {REMEDY}, or run the adapter with PEFT"
    return (
        f"{where}; if it is tied to another tensor, save the base with both tensors and tie_word_embeddings=false, "
        "and merge into that"
    )


def _rows(parameter: str, trained: Trained, adapter: Adapter, base: Checkpoint, naming: Naming) -> Matrix:
    """The rows of a stored tensor that are the weight of a trained module."""
    found = _pieces(parameter, base, naming)
    if len(found.runs) > 1 or len(found.shape) != 2:
        names = listed(list(dict.fromkeys(run.name for run in found.runs)))
        raise MergeError(
            f"{base.location}: {parameter} is made of {names}, and shard {trained.label} of {adapter.path} would have "
            "to be taken apart; save the base in the form of its class, and merge into that"
        )
    run = found.runs[0]
    return fused_rows(base.tensors[run.name], run.first, run.count, Order(*found.order) if found.order else None)


def _pieces(parameter: str, base: Checkpoint, naming: Naming) -> Pieces:
    made = naming.names.converted[parameter]
    shapes = {name: base.tensors[name].shape for names in made.stored.values() for name in names}
    try:
        try:
            return pieces_of(made, parameter, shapes, base.config or {}, naming.model.shapes)
        except Unknown:  # the shapes of its parameters may tell
            exact = exact_names(naming.model.name, base) if naming.model.shapes is None else None
            if exact is None or parameter not in exact.converted:
                raise
            return pieces_of(exact.converted[parameter], parameter, shapes, base.config or {}, exact.model.shapes)
    except Unknown as problem:
        raise MergeError(
            f"{base.location}: {parameter} is made of {listed(list(shapes))} in a way that is not understood "
            f"({problem}); save the base in the form of its class (transformers, save_original_format=False), "
            "and merge into that"
        ) from problem
