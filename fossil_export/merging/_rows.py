"""Rows of tokens that were trained: which tied tensors have them, and where they go.

PEFT lets what is tied to the input embedding have the embedding's rows (`set_additional_trainable_modules` in
peft/utils/other.py, `inject_adapter` in peft/tuners/trainable_tokens/model.py), so that the two stay tied; but not if
the config's own tie is off, if the embedding is not among them, or if the others have rows of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

from fossil_export.adapters import Adapter, Trained
from fossil_export.adapters._targets import Targets
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import slice_of
from fossil_export.errors import MergeError
from fossil_export.merging._brought import REMEDY, Brought
from fossil_export.merging._change import Piece
from fossil_export.merging._naming import Naming
from fossil_export.merging._placement import Pair, Placement
from fossil_export.merging._quantized import refuse_parts


class Tied(Protocol):
    """Parameters that are one while they are tied."""

    @property
    def members(self) -> tuple[str, ...]: ...

    @property
    def fields(self) -> tuple[tuple[str, ...], ...]: ...


def follow(
    group: Tied, naming: Naming, adapter: Adapter, base: Checkpoint, brought: Brought, placement: Placement
) -> None:
    """Give the rows of the input embedding to all that have them in the live model.

    Raises MergeError for a file whose rows are two where the live model has one.
    """
    embedding = f"{naming.model.embedding}.weight"
    rows = brought.rows.get(embedding)
    if rows is None or embedding not in group.members:
        return
    on = (base.config or {}).get("tie_word_embeddings")
    if on is None and group.fields != (("tie_word_embeddings",),):
        raise MergeError(
            f"{base.location}: its config.json has no tie_word_embeddings of its own, so whether what is tied to "
            f"{embedding} was trained with it ({rows.label}) cannot be told; write it there"
        )
    if on is False:
        return
    one_parameter = rows.method == "trainable_tokens"
    own = [member for member in group.members if member in brought.rows and member != embedding]
    if any(brought.rows[member].numbers != rows.numbers for member in own):
        return
    for member in group.members:
        # The file may hold a parameter of both once more; only the values tell.
        if member in own and placement.tied is None:
            tensors = (rows.tensors["rows"], brought.rows[member].tensors["rows"])
            placement.undecided += (Pair((embedding, member), tensors),)
        if member not in own or placement.tied or (one_parameter and placement.tied is None):
            brought.rows[member] = rows
        elif one_parameter:
            raise MergeError(
                f"{adapter.path}: {rows.label} and {brought.rows[member].label} are one parameter in the model that "
                "was trained, and have other values; save the adapter again"
            )


def refuse_unfollowed(groups: Iterable[Tied], naming: Naming, adapter: Adapter, brought: Brought) -> None:
    """Raise MergeError for rows of a module that is neither targeted nor tied to the input embedding, and for such a
    LoRA, if what is tied is trained together."""
    embedding = f"{naming.model.embedding}.weight"
    tied = {member for group in groups if embedding in group.members for member in group.members}
    path, config = adapter.files[0], adapter.config
    targets = Targets(path, config)
    methods = ("trainable_tokens", *(("lora", "lora_embedding") if config.get("ensure_weight_tying") else ()))
    for parameter, one in [*brought.rows.items(), *brought.trained.items()]:
        if one.method not in methods or parameter in tied:
            continue
        if not targets.have(one.owner):
            raise MergeError(
                f"{path}: target_modules does not cover {one.owner}, which {naming.model.name or 'the base'} does not "
                "tie to its embedding, and for which there are tensors; the files do not belong together"
            )


def rows_differ(group: Tied, brought: Brought) -> bool:
    """Whether the members of a group have other rows than each other."""
    return len({id(brought.rows.get(member)) for member in group.members}) > 1


def place_rows(
    adapter: Adapter, base: Checkpoint, naming: Naming, brought: Brought, placement: Placement, into_floats: bool
) -> None:
    """Put rows of tokens where the base has them, or what the adapter brings in its place; `into_floats` as `place` has
    it."""
    for parameter, one in brought.rows.items():
        _refuse_bias(parameter, one, adapter, base, naming)
        name = naming.names.whole.get(parameter, parameter)
        if name not in base.tensors:
            name = naming.names.spelling(parameter) or name
            if name not in placement.saved and name not in placement.copied:
                if any(other in naming.names and brought.rows[other] is one for other in brought.rows):
                    continue  # it is tied to that one still
                raise MergeError(
                    f"{base.location}: has no {name}, of which {one.label} of {adapter.path} has rows; {REMEDY}"
                )
        tensor = placement.source(name, base.tensors.get(name))
        if into_floats:
            refuse_parts(name, tensor.dtype, base)
        info = one.tensors["rows"]
        reason = one.mismatch((tensor.shape[0], tensor.shape[1])) if len(tensor.shape) == 2 else "it is no matrix"
        if reason:
            raise MergeError(
                f"{base.location}: {name} {list(tensor.shape)} does not fit {info.name} {list(info.shape)} of "
                f"{adapter.path}: {reason}; {REMEDY}"
            )
        width = info.shape[1]
        tokens = one.numbers["tokens"]
        # Rows one after another are one piece.
        edges = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(tokens)) if b != a + 1), len(tokens)]
        pieces = tuple(
            Piece(
                tokens[first] * width,
                slice_of(info, first * width, (last - first) * width, ((last - first) * width,)),
                above=True,
            )
            for first, last in pairwise(edges)
        )
        assert sum(element_count(piece.source.shape) for piece in pieces) == element_count(info.shape)
        placement.pieces[name] = (*placement.pieces.get(name, ()), *pieces)


def _refuse_bias(parameter: str, one: Trained, adapter: Adapter, base: Checkpoint, naming: Naming) -> None:
    """Raise MergeError for rows of a layer with a bias: PEFT computes with the weight alone
    (`TrainableTokensLayer.forward_adapters` in peft/tuners/trainable_tokens/layer.py)."""
    bias = f"{parameter.rpartition('.')[0]}.bias"
    tied = any(bias in (tie.target, tie.source) for tie in naming.model.ties if tie.on)
    if bias in naming.names or tied:
        raise MergeError(
            f"{adapter.path}: has rows of {parameter} ({one.label}), and PEFT leaves {bias} of {base.location} out of "
            "the model while it trains these; no model of this class has none, so run the adapter beside it, with PEFT"
        )
