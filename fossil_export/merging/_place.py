"""Where every tensor of the adapter goes in the base: matched, checked, or refused."""

from __future__ import annotations

from collections.abc import Mapping

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.layouts import Matrix, find_matrix
from fossil_export.errors import MergeError, listed
from fossil_export.merging._config import CLASSIFIERS
from fossil_export.merging._match import match_names
from fossil_export.merging._placement import Placement
from fossil_export.merging._ties import check_vocabulary, embedding_tensor, is_head, is_tied_head, part_head

_LABEL_LAYERS = ("score", "classifier", "out_proj", "qa_outputs")
_REMEDY = "name the base model it was trained from with --base"

QUANTIZED = (
    "the base is quantized, and shards are merged into float weights; name the unquantized model with --base if the "
    "adapter was trained on that (one trained on the quantized weights is another model there: merge it into these "
    "weights dequantized)"
)


def place(adapter: Adapter, base: Checkpoint, tied: bool | None = None, *, into_floats: bool = True) -> Placement:
    """Give every trained and saved tensor of `adapter` its place in `base`, or raise MergeError naming it.

    Only headers are read. `tied` says what they do not: whether a head and an embedding that came with the adapter are
    equal (`ties.are_equal`); without it they are taken as parted, and `Placement.undecided` names them. The base's
    weights must be floats, unless nothing will be added to them (`into_floats` is False).
    """
    placement = Placement()
    names = _match(adapter, base)
    missing = [module for module in adapter.trained if module not in names]
    if missing:
        raise MergeError(
            f"{base.location}: has no weights for {listed(missing)}, which adapter "
            f"{adapter.path} was trained on; {_REMEDY}"
        )
    for module, trained in adapter.trained.items():
        placement.trained[f"{names[module]}.weight"] = trained
    for name, info in adapter.saved.items():
        _place_saved(name, info, names, adapter, base, placement)
    part_head(adapter, base, placement, tied)
    check_vocabulary(adapter, base, placement)
    _refuse_homeless(adapter, base, placement)
    for name, trained in placement.trained.items():
        placement.into[name] = _matrix(name, trained, placement, adapter, base, into_floats)
    placement.warnings = tuple(_warnings(adapter, base, set(names.values())))
    return placement


def _match(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """The base's name of each trained module; new modules and unstored heads keep the adapter's."""
    known = {name.rpartition(".")[0] for name in base.tensors}

    def fits(module: str, candidate: str) -> bool:
        trained = adapter.trained.get(module)
        matrix = find_matrix(f"{candidate}.weight", base.tensors, base.config) if trained is not None else None
        return trained is None or (matrix is not None and trained.mismatch(matrix.shape) is None)

    modules = dict.fromkeys([*adapter.trained, *(name.rpartition(".")[0] for name in adapter.saved)])
    here = {module for module in modules if is_tied_head(module, base)}
    # A weight may lie in a tensor of another name, which its layout knows.
    here |= {m for m in adapter.trained if m not in known and find_matrix(f"{m}.weight", base.tensors, base.config)}
    own = [m for m in modules if m not in here and (m in known or not _is_new(m, adapter, base))]
    return {module: module for module in modules if module in here} | match_names(own, known, fits)


def _is_new(module: str, adapter: Adapter, base: Checkpoint) -> bool:
    """Whether the base has no tensor for `module` by right: it was trained from scratch, or is a tied head."""
    return is_tied_head(module, base) or (module not in adapter.trained and _trained_whole(module, adapter))


def _is_classifier(module: str, parameter: str, adapter: Adapter) -> bool:
    """Whether `module` is the last layer of a classification head, whose outputs are the labels."""
    last = module.rpartition(".")[2]
    return parameter == "weight" and adapter.config.get("task_type") in CLASSIFIERS and last in _LABEL_LAYERS


def _trained_whole(module: str, adapter: Adapter) -> bool:
    """Whether `module` is, or lies in, one of the config's modules_to_save."""
    parts = module.split(".")
    return any(name in parts or module.endswith(name) for name in adapter.config.get("modules_to_save") or ())


def _place_saved(
    name: str, info: TensorInfo, names: Mapping[str, str], adapter: Adapter, base: Checkpoint, placement: Placement
) -> None:
    """Put one whole trained tensor in the place of the base's, or beside the base's tensors."""
    module, _, parameter = name.rpartition(".")
    target = f"{names.get(module, module)}.{parameter}"
    old = base.tensors.get(target)
    is_vocabulary = is_head(module) or target == embedding_tensor(base.tensors)
    if old is None:
        if not (is_tied_head(module, base) and parameter == "weight") and not _trained_whole(module, adapter):
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location}, and its module is "
                f"not in modules_to_save; {_REMEDY}"
            )
        placement.added.append(target)
        embedding = base.tensors.get(embedding_tensor(base.tensors) or "")
        if is_vocabulary and embedding is not None and embedding.shape != info.shape:
            placement.vocab_size = info.shape[0]
    elif old.shape[1:] != info.shape[1:] or (old.shape != info.shape and not is_vocabulary):
        if not _trained_whole(module, adapter) or is_vocabulary:
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} {list(info.shape)} does not fit {target} {list(old.shape)} "
                f"of {base.location}; {_REMEDY}"
            )
    elif is_vocabulary and old.shape != info.shape:
        placement.vocab_size = info.shape[0]
    if _is_classifier(module, parameter, adapter) and (old is None or old.shape != info.shape):
        placement.labels = info.shape[0]
    placement.saved[target] = info


def _refuse_homeless(adapter: Adapter, base: Checkpoint, placement: Placement) -> None:
    """Raise MergeError for a shard whose module the base knows, but without the weight that it changes."""
    for name, trained in placement.trained.items():
        if name in base.tensors or name in placement.saved or name in placement.copied:
            continue
        if find_matrix(name, base.tensors, base.config) is not None:
            continue
        module = name.removesuffix(".weight")
        beside = sorted(other.rpartition(".")[2] for other in base.tensors if other.rpartition(".")[0] == module)
        where = f"{base.location}: has no {name}, which shard {trained.label} of {adapter.path} changes"
        if set(beside) - {"bias"}:
            raise MergeError(f"{where}, but {listed(beside)}: {QUANTIZED}")
        raise MergeError(
            f"{where}; if it is tied to another tensor, save the base with both tensors and tie_word_embeddings=false, "
            "and merge into that"
        )


def _matrix(
    name: str, trained: Trained, placement: Placement, adapter: Adapter, base: Checkpoint, into_floats: bool
) -> Matrix:
    """Where the weight lies that `trained` changes. Raises MergeError for one that it does not fit."""
    brought = placement.saved.get(name) or placement.copied.get(name)
    matrix = find_matrix(name, base.tensors if brought is None else {**base.tensors, name: brought}, base.config)
    weight = brought or base.tensors.get(name) or (matrix.stored[0] if matrix is not None else None)
    assert weight is not None, name
    where = f"{base.location}: {name} {list(weight.shape)}"
    dtypes = [weight.dtype] if matrix is None else [matrix.dtype, matrix.stored[0].dtype]
    if into_floats and (others := [dtype for dtype in dtypes if dtype not in FLOATS]):
        raise MergeError(f"{where} is stored as {others[0]}: {QUANTIZED}")
    if matrix is None or 0 in matrix.shape:
        raise MergeError(f"{where} is no matrix, but the adapter has a shard for it ({trained.label}); {_REMEDY}")
    if reason := trained.mismatch(matrix.shape):
        shapes = " and ".join(str(list(info.shape)) for info in trained.tensors.values())
        raise MergeError(f"{where} does not fit shard {trained.label} {shapes} of {adapter.path}: {reason}; {_REMEDY}")
    return matrix


def _warnings(adapter: Adapter, base: Checkpoint, placed: set[str]) -> list[str]:
    """Modules that the config targets but that have no shard, beside others that do: the file may be incomplete."""
    targets = adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    if not isinstance(targets, list) or narrowed:
        return []
    heads = tuple({_up_to_number(module) for module in placed})
    bare = [
        module
        for module, info in ((name.removesuffix(".weight"), info) for name, info in base.tensors.items())
        if module not in placed and len(info.shape) == 2 and module.startswith(heads)
        if any(f".{module}".endswith(f".{target}") for target in targets)
    ]
    if not bare:
        return []
    return [f"target_modules covers {listed(bare)}, but the adapter has no shard for that; is it complete?"]


def _up_to_number(module: str) -> str:
    """What comes before the number of the layer."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number])
