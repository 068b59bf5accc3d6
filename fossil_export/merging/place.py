"""Where every tensor of the adapter goes in the base: matched, checked, tied or parted, or refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from fossil_export.adapters import Adapter, Shard
from fossil_export.checkpoints.checkpoint import Checkpoint
from fossil_export.checkpoints.dtypes import FLOATS
from fossil_export.checkpoints.header import TensorInfo
from fossil_export.errors import MergeError, listed
from fossil_export.merging.match import match_names
from fossil_export.merging.ties import declared_tie, embedding_tensor, head_module
from fossil_export.methods import METHODS


@dataclass
class Placement:
    """Changes to the base, by the name of the tensor in it.

    `sources` replaces what a tensor is made from (the names in `from_adapter` by the adapter's tensors, the
    others by the base's), `shards` adds an update to it, `added` names tensors the base does not have.
    """

    sources: dict[str, TensorInfo] = field(default_factory=dict)
    from_adapter: set[str] = field(default_factory=set)
    shards: dict[str, Shard] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    untie: bool = False
    vocab_size: int | None = None
    labels: int | None = None
    warnings: tuple[str, ...] = ()


def place(adapter: Adapter, base: Checkpoint) -> Placement:
    """Give every shard and saved tensor of `adapter` its place in `base`, or raise MergeError naming it."""
    placement = Placement()
    names = _match(adapter, base)
    missing = [module for module in adapter.shards if module not in names and not _is_tied_head(module, adapter, base)]
    if missing:
        raise MergeError(
            f"{base.location}: has no weights for {listed(missing)}, which the adapter {adapter.path} was trained on; "
            "name the base model it was trained from with --base"
        )
    for module, shard in adapter.shards.items():
        if module in names:
            placement.shards[f"{names[module]}.weight"] = shard
    for name, info in adapter.saved.items():
        _place_saved(name, info, names, adapter, base, placement)
    _part_head(adapter, base, names, placement)
    for name, shard in placement.shards.items():
        _check_shape(name, shard, placement.sources.get(name) or base.tensors[name], adapter, base)
    placement.warnings = tuple(_warnings(adapter, base, names))
    return placement


def _match(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    known = {name.rpartition(".")[0] for name in base.tensors}

    def fits(module: str, candidate: str) -> bool:
        shard, info = adapter.shards.get(module), base.tensors.get(f"{candidate}.weight")
        if shard is None:
            return True
        return info is not None and len(info.shape) == 2 and _mismatch(shard, info.shape) is None

    modules = list(adapter.shards) + [name.rpartition(".")[0] for name in adapter.saved]
    wanted = [module for module in dict.fromkeys(modules) if not _is_new(module, adapter, known)]
    return match_names(wanted, known, fits)


def _is_new(module: str, adapter: Adapter, known: set[str]) -> bool:
    """Whether a module is trained from scratch (a classifier) or a head that a tied base does not store."""
    is_extra = module in adapter.config.get("modules_to_save", ()) if module not in known else False
    return is_extra or (head_module([module]) is not None and not any(name.endswith(module) for name in known))


def _is_tied_head(module: str, adapter: Adapter, base: Checkpoint) -> bool:
    return (
        head_module([module]) is not None
        and embedding_tensor(base.tensors) is not None
        and declared_tie(base.config) is not False
    )


def _mismatch(shard: Shard, weight_shape: tuple[int, ...]) -> str | None:
    return METHODS[shard.variant].mismatch(shard.tensor.shape, weight_shape)


def _check_shape(name: str, shard: Shard, weight: TensorInfo, adapter: Adapter, base: Checkpoint) -> None:
    where = f"{base.location}: {name} {list(weight.shape)}"
    if weight.dtype not in FLOATS:
        raise MergeError(
            f"{where} is stored as {weight.dtype}, a quantized base; shards are merged into float weights, "
            "name the unquantized model with --base"
        )
    if len(weight.shape) != 2:
        raise MergeError(
            f"{where} is no matrix, but the adapter has a shard for it ({shard.tensor.name}); name the base it was trained on with --base"
        )
    if reason := _mismatch(shard, weight.shape):
        raise MergeError(
            f"{where} does not fit shard {shard.tensor.name} {list(shard.tensor.shape)} of {adapter.path}: {reason}; "
            "name the base model it was trained from with --base"
        )


def _place_saved(
    name: str, info: TensorInfo, names: dict[str, str], adapter: Adapter, base: Checkpoint, placement: Placement
) -> None:
    """Put one whole trained tensor in the place of the base's, or beside the base's tensors."""
    module, _, parameter = name.rpartition(".")
    target = f"{names[module]}.{parameter}" if module in names else name
    old = base.tensors.get(target)
    if old is None:
        is_head = head_module([module]) is not None and parameter == "weight"
        if not is_head and not _listed_to_save(module, adapter):
            raise MergeError(
                f"{adapter.path}: saved tensor {info.name} has no counterpart in {base.location} and is not in modules_to_save; "
                "name the base model it was trained from with --base"
            )
        placement.added.append(target)
        if not is_head and parameter == "weight":
            placement.labels = info.shape[0]
    elif old.shape != info.shape:
        resized = target == embedding_tensor(base.tensors) or head_module([module]) is not None
        if not resized or old.shape[1:] != info.shape[1:]:
            if not _listed_to_save(module, adapter):
                raise MergeError(
                    f"{adapter.path}: saved tensor {info.name} {list(info.shape)} does not fit {target} {list(old.shape)} of "
                    f"{base.location}; name the base model it was trained from with --base"
                )
            placement.labels = info.shape[0] if parameter == "weight" else placement.labels
        else:
            placement.vocab_size = info.shape[0]
    placement.sources[target] = info
    placement.from_adapter.add(target)


def _listed_to_save(module: str, adapter: Adapter) -> bool:
    """Whether `module` is, or lies in, a module that was trained whole (modules_to_save in the config)."""
    parts = module.split(".")
    return any(part in parts for part in adapter.config.get("modules_to_save") or ())


def _part_head(adapter: Adapter, base: Checkpoint, names: dict[str, str], placement: Placement) -> None:
    """Store head and embedding apart once training has parted them; keep them tied where they are still equal."""
    embedding = embedding_tensor(base.tensors)
    if embedding is None or declared_tie(base.config) is False:
        return
    tied_shard = next((module for module in adapter.shards if module not in names), None)
    added_head = next((name for name in placement.added if head_module([name.rpartition(".")[0]])), None)
    stored = next(
        (name for name in base.tensors if name.endswith(".weight") and head_module([name.rpartition(".")[0]])), None
    )
    head = added_head or (f"{tied_shard}.weight" if tied_shard else stored)
    if head is None:
        if embedding not in placement.sources:
            return
        head = _head_beside(embedding)
    touched = {embedding, head} & (placement.sources.keys() | placement.shards.keys()) or tied_shard
    if not touched:
        return
    if (
        stored is None
        and tied_shard is None
        and head in placement.sources
        and _same(adapter, base, placement, embedding, head)
    ):
        del placement.sources[head]
        placement.from_adapter.discard(head)
        placement.added.remove(head)
        return
    if stored is None and head not in placement.added:
        placement.added.append(head)
    if stored is None:
        placement.sources.setdefault(head, base.tensors[embedding])
    if tied_shard is not None:
        placement.shards[head] = adapter.shards[tied_shard]
    placement.untie = True


def _head_beside(embedding: str) -> str:
    """The head's name in a causal model whose embedding is called `embedding` (transformers' convention)."""
    return "embed_out.weight" if "embed_in" in embedding else "lm_head.weight"


def _same(adapter: Adapter, base: Checkpoint, placement: Placement, embedding: str, head: str) -> bool:
    """Whether the head the adapter saved is the embedding it will be stored with, byte for byte."""
    import numpy as np

    trained = placement.sources.get(embedding)
    source = placement.sources[head]
    if trained is not None:
        first = adapter.array(trained)
    else:
        old = base.tensors[embedding]
        if old.dtype != source.dtype or old.shape != source.shape:
            return False
        first = (
            np.memmap(old.path, np.uint8, "r", old.offset or 0, (old.nbytes,))
            .view(adapter.array(source).dtype)
            .reshape(old.shape)
        )
    second = adapter.array(source)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    rows = max(1, (1 << 22) // max(1, first.shape[1] * first.itemsize))
    return all(
        first[start : start + rows].tobytes() == second[start : start + rows].tobytes()
        for start in range(0, len(first), rows)
    )


def _warnings(adapter: Adapter, base: Checkpoint, names: dict[str, str]) -> list[str]:
    """Modules the config targets that have no shard: PEFT trains all it finds, so the file may be incomplete."""
    targets = adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    if not isinstance(targets, list) or narrowed:
        return []
    placed = set(names.values())
    heads = {
        name[: -len(tail)]
        for module in adapter.shards
        if module in names
        for name, tail in [(names[module], _tail(names[module]))]
    }
    bare = [
        name.removesuffix(".weight")
        for name, info in base.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name.removesuffix(".weight") not in placed
    ]
    left = [
        module
        for module in bare
        if any(module == target or module.endswith(f".{target}") for target in targets)
        and any(module.startswith(head) for head in heads)
    ]
    return (
        [f"target_modules covers {listed(left)}, but the adapter has no shard for it; is the adapter complete?"]
        if left
        else []
    )


def _tail(module: str) -> str:
    """From the numbered layer on."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[number:])
