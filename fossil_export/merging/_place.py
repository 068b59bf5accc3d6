"""Where every tensor of the adapter goes in the base: matched, checked, or refused."""

from __future__ import annotations

from collections.abc import Mapping

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import FLOATS, element_count
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.layouts import Matrix, Order, find_matrix, fused_rows
from fossil_export.errors import MergeError, listed
from fossil_export.merging._change import Piece
from fossil_export.merging._config import CLASSIFIERS
from fossil_export.merging._naming import Naming, naming_of
from fossil_export.merging._placement import Placement
from fossil_export.merging._ties import Brought, declared_tie, embedding_tensor, is_head, part
from fossil_export.merging._warnings import warnings_of
from fossil_export.models import Pieces, Unknown, pieces_of

_LABEL_LAYERS = ("score", "classifier", "out_proj", "qa_outputs")
_REMEDY = "name the base model it was trained from with --base"

QUANTIZED = (
    "the base is quantized, and shards are merged into float weights; name the unquantized model with --base if the "
    "adapter was trained on that (one trained on the quantized weights is another model there: merge it into these "
    "weights dequantized)"
)


def place(adapter: Adapter, base: Checkpoint, tied: bool | None = None, *, into_floats: bool = True) -> Placement:
    """Give every trained and saved tensor of `adapter` its place in `base`, or raise MergeError naming it.

    Only headers are read. `tied` says what they do not: whether tensors that the base ties and that came with the
    adapter are equal (`ties.are_equal`); without it they are taken as parted, and `Placement.undecided` names them. The
    base's weights must be floats, unless nothing will be added to them (`into_floats` is False).
    """
    naming = naming_of(adapter, base)
    placement = Placement(tied=tied)
    brought = _brought(adapter, base, naming)
    _refuse_untold(adapter, base, naming, brought)
    copied = part(naming, adapter, base, brought, placement)
    _refuse_missing(adapter, base, naming, brought, copied)
    for parameter, source in copied.items():
        name = _name_for(parameter, naming, base)
        placement.copied[name] = base.tensors[naming.names.whole[source]]
        placement.added.append(name)
    for parameter, info in brought.saved.items():
        _place_saved(parameter, info, adapter, base, naming, placement)
    for parameter, trained in brought.trained.items():
        _place_trained(parameter, trained, adapter, base, naming, placement, into_floats)
    _check_vocabulary(adapter, base, naming, placement)
    if placement.added and naming.known and not _has_added(base, naming, placement):
        placement.architecture = naming.model.name
    placement.warnings = tuple(warnings_of(adapter, base, naming, brought))
    return placement


def _brought(adapter: Adapter, base: Checkpoint, naming: Naming) -> Brought:
    """What the adapter brings, by parameter. Raises MergeError for what the base's model has no parameter for."""
    brought, missing = Brought(), []
    for module, trained in adapter.trained.items():
        parameter = _parameter(f"{module}.weight", naming, base)
        if parameter is None:
            missing.append(module)
        elif parameter in brought.trained:
            raise MergeError(
                f"modules {brought.trained[parameter].module} and {module} both match {parameter} in the base; "
                "name the base they were trained on with --base"
            )
        else:
            brought.trained[parameter] = trained
    if missing:
        raise MergeError(_no_weights(missing, adapter, base, naming))
    for name, info in adapter.saved.items():
        parameter = _parameter(name, naming, base)
        if parameter is None:
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location}{_as(naming)}; "
                f"{_remedy(naming, base)}"
            )
        if parameter in brought.saved:
            raise MergeError(f"{adapter.path}: holds {parameter} twice, also as {info.name}; keep one")
        brought.saved[parameter] = info
    return brought


def _refuse_missing(
    adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought, copied: Mapping[str, str]
) -> None:
    """Raise MergeError for shards whose weights the class has and the base lacks."""
    known = {name.rpartition(".")[0] for name in base.tensors}
    missing = []
    for parameter, trained in brought.trained.items():
        if parameter in naming.names or parameter in copied or parameter in brought.saved:
            continue
        if find_matrix(parameter, base.tensors, base.config) is None and parameter.rpartition(".")[0] not in known:
            missing.append(trained.module)
    if missing:
        raise MergeError(_no_weights(missing, adapter, base, naming))


def _no_weights(modules: list[str], adapter: Adapter, base: Checkpoint, naming: Naming) -> str:
    return (
        f"{base.location}: has no weights for {listed(modules)}, which adapter {adapter.path} was trained on"
        f"{_as(naming)}; {_remedy(naming, base)}"
    )


def _parameter(name: str, naming: Naming, base: Checkpoint) -> str | None:
    found = naming.parameter(name)
    if found is not None:
        return found
    if name in base.tensors or find_matrix(name, base.tensors, base.config) is not None:
        # A class of the model's own code has the names of its files.
        return next((one for one, stored in naming.names.whole.items() if stored == name), name)
    return None


def _as(naming: Naming) -> str:
    return f" (as {naming.model.name}, which transformers makes of it)" if naming.known else ""


def _remedy(naming: Naming, base: Checkpoint) -> str:
    if naming.known:
        return _REMEDY
    if base.config is None:
        return f"{_REMEDY} as a folder with its config.json, which tells how its tensors are named"
    return f"{_REMEDY}, or install a transformers that knows this model, if its names differ"


def _refuse_untold(adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought) -> None:
    """Raise MergeError for an embedding or head of a model that transformers does not know: whether they are tied, and
    how, its config may leave to its code."""
    if naming.known or declared_tie(base.config) is False:
        return
    if base.config is None:
        reason, way = "has no config.json", "name the model's folder, with its config.json, with --base"
    else:
        reason = "is a model that transformers does not know"
        way = (
            'say it in its config.json ("tie_word_embeddings": false, with both tensors stored), or install a '
            "transformers that knows the model"
        )
    vocabulary = {(part or {}).get("vocab_size") for part in (base.config, (base.config or {}).get("text_config"))}
    for name in [*brought.saved, *brought.trained]:
        info = brought.saved.get(name) or base.tensors.get(name)
        rows = info.shape[0] if info is not None and info.shape else None
        if is_head(name.rpartition(".")[0]) or embedding_tensor([name]) or (rows in vocabulary and rows is not None):
            raise MergeError(
                f"{base.location}: {reason}, so whether {name}, which came with {adapter.path}, is tied to another "
                f"tensor cannot be told; {way}"
            )


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
    is_vocabulary = _is_vocabulary(parameter, naming, base)
    if target is None or old is None:
        if not naming.model.has(parameter):
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location}{_as(naming)}; "
                f"{_remedy(naming, base)}"
            )
        target = _name_for(parameter, naming, base)
        placement.added.append(target)
        rows = _vocabulary_rows(base, naming)
        if is_vocabulary and rows is not None and info.shape and rows != info.shape[0]:
            placement.vocab_size = info.shape[0]
    elif old.dtype != info.dtype and not {old.dtype, info.dtype} <= set(FLOATS):
        raise MergeError(
            f"{adapter.path}: saved tensor {info.name} is {info.dtype}, and {target} of {base.location} is "
            f"{old.dtype}; {_REMEDY}"
        )
    elif old.shape[1:] != info.shape[1:] or (old.shape != info.shape and not is_vocabulary):
        if not _trained_whole(info.name, module, adapter) or is_vocabulary:
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} {list(info.shape)} does not fit {target} {list(old.shape)} "
                f"of {base.location}; {_REMEDY}"
            )
    elif is_vocabulary and old.shape != info.shape:
        placement.vocab_size = info.shape[0]
    if _is_classifier(parameter, adapter) and (old is None or old.shape != info.shape):
        placement.labels = info.shape[0]
    placement.saved[target] = info


def _place_pieces(
    parameter: str, info: TensorInfo, adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement
) -> None:
    """Put a whole trained tensor where the base has its rows: in a part of a tensor, or in several."""
    found = _pieces(parameter, base, naming)
    where = f"{adapter.path}: saved tensor {info.name} {list(info.shape)}"
    if found.shape != info.shape:
        raise MergeError(f"{where} does not fit {parameter} {list(found.shape)} of {base.location}; {_REMEDY}")
    order = Order(*found.order) if found.order is not None else None
    width = info.shape[-1] if len(info.shape) > 1 else 1
    at = 0
    for run in found.runs:
        stored, size = base.tensors[run.name], run.count * width
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
        raise MergeError(f"{where} is stored as {others[0]}: {QUANTIZED}")
    if reason := trained.mismatch(matrix.shape):
        shapes = " and ".join(str(list(info.shape)) for info in trained.tensors.values())
        raise MergeError(f"{where} does not fit shard {trained.label} {shapes} of {adapter.path}: {reason}; {_REMEDY}")
    placement.trained[name] = trained
    placement.into[name] = matrix


def _checked(matrix: Matrix | None, weight: TensorInfo | None, name: str, trained: Trained, base: Checkpoint) -> Matrix:
    if matrix is None or 0 in matrix.shape:
        shape = list(weight.shape) if weight is not None else []
        if weight is not None and weight.dtype not in FLOATS:
            raise MergeError(f"{base.location}: {name} {shape} is stored as {weight.dtype}: {QUANTIZED}")
        raise MergeError(
            f"{base.location}: {name} {shape} is no matrix, but the adapter has a shard for it ({trained.label}); "
            f"{_REMEDY}"
        )
    return matrix


def _homeless(name: str, trained: Trained, adapter: Adapter, base: Checkpoint) -> str:
    """Why a shard has no weight to change, whose module the model has."""
    module = name.removesuffix(".weight")
    beside = sorted(other.rpartition(".")[2] for other in base.tensors if other.rpartition(".")[0] == module)
    where = f"{base.location}: has no {name}, which shard {trained.label} of {adapter.path} changes"
    if set(beside) - {"bias"}:
        return f"{where}, but {listed(beside)}: {QUANTIZED}"
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
        return pieces_of(made, parameter, shapes, base.config or {}, naming.model.shapes)
    except Unknown as problem:
        raise MergeError(
            f"{base.location}: {parameter} is made of {listed(list(shapes))} in a way that is not understood "
            f"({problem}); save the base in the form of its class (transformers, save_original_format=False), "
            "and merge into that"
        ) from problem


def _is_vocabulary(parameter: str, naming: Naming, base: Checkpoint) -> bool:
    """Whether the rows of a parameter are the tokens of the vocabulary."""
    module = parameter.rpartition(".")[0]
    if not naming.known:
        return is_head(module) or parameter == embedding_tensor(base.tensors)
    if module in (naming.model.embedding, naming.model.head):
        return True
    tied = {tie.target: tie.source for tie in naming.model.ties}
    both = {*tied, *tied.values()}
    return parameter in both


def _vocabulary_rows(base: Checkpoint, naming: Naming) -> int | None:
    """The rows of the base's embedding."""
    name = naming.names.whole.get(f"{naming.model.embedding}.weight")
    name = name or embedding_tensor(base.tensors)
    return base.tensors[name].shape[0] if name is not None and base.tensors[name].shape else None


def _check_vocabulary(adapter: Adapter, base: Checkpoint, naming: Naming, placement: Placement) -> None:
    """Raise MergeError where the vocabulary was resized and only one of embedding and head came with the adapter."""
    if placement.vocab_size is None:
        return
    modules = [module for module in (naming.model.embedding, naming.model.head) if module is not None]
    names = [naming.names.whole.get(f"{module}.weight") for module in modules]
    if not naming.known:
        names = [name for name in base.tensors if name.endswith(".weight") and is_head(name[:-7])]
        names.append(embedding_tensor(base.tensors))
    for name in names:
        if name is None:
            continue
        rows = placement.source(name, base.tensors.get(name)).shape[0]
        if rows != placement.vocab_size:
            raise MergeError(
                f"{adapter.path}: was trained with {placement.vocab_size} tokens, but {name}, not in it, has {rows}; "
                "save the adapter with save_pretrained(..., save_embedding_layers=True)"
            )


def _is_classifier(parameter: str, adapter: Adapter) -> bool:
    """Whether a parameter is the last layer of a classification head, whose outputs are the labels."""
    module, _, last = parameter.rpartition(".")
    layer = module.rpartition(".")[2]
    return last == "weight" and adapter.config.get("task_type") in CLASSIFIERS and layer in _LABEL_LAYERS


def _trained_whole(name: str, module: str, adapter: Adapter) -> bool:
    """Whether `module` is, or lies in, one of the config's modules_to_save."""
    whole = adapter.config.get("modules_to_save") or ()
    own = name.rpartition(".")[0]
    return any(one in path.split(".") or path.endswith(one) for one in whole for path in (module, own))


def _has_added(base: Checkpoint, naming: Naming, placement: Placement) -> bool:
    """Whether a class that the base's config names has what is added."""
    named = (base.config or {}).get("architectures") or ()
    return naming.model.name in named
