"""The LoRA that an adapter is: of each module a rank, a scale s, A and B, its update being s · B A.

LoRA's own tensors stay as they are. Of another method it is the low-rank form (methods/_low_rank.py), with s = 1. A
method whose update depends on the weight, or is of full rank, has none; its LoRA is the nearest of some rank (see
`_nearest`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.converting._options import Options
from fossil_export.errors import AdapterError, listed
from fossil_export.merging._naming import naming_of
from fossil_export.methods import METHODS

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

Kind = Literal["linear", "embedding", "bias"]

ENDINGS: dict[Kind, tuple[str, ...]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "bias": ("lora_B.bias",),
}
"""How PEFT's LoRA names the tensors of a module. An embedding has A (r, tokens) and B (dims, r)."""


@dataclass(frozen=True)
class Part:
    """What one trained entry is in a LoRA: `name` in `Adapter.trained`, `module` as PEFT calls it. `rank` is None if
    there is none that is exact, 0 for a bias; `own` says that the trained tensors are LoRA's own."""

    name: str
    module: str
    kind: Kind
    rank: int | None
    scale: float = 1.0
    own: bool = False


OWN: dict[str, Kind] = {"lora": "linear", "lora_embedding": "embedding", "lora_bias": "bias"}
"""The methods that PEFT's plain LoRA is. Others have tensors of the same names, and mean something else by them."""


def parts_of(adapter: Adapter, options: Options) -> list[Part]:
    """What each entry of the adapter is. Raises AdapterError for what a LoRA has no place for."""
    parts = [_part(adapter, name, trained) for name, trained in adapter.trained.items()]
    # Of LoRA itself the tensors' names say whether it is an embedding, and of its kin.
    others = [part for part in parts if part.kind == "linear" and not part.own]
    if options.base is None or not others:
        return parts
    with options.base.by_name():
        naming = naming_of(adapter, options.base.checkpoint())
    if not naming.known or naming.model.embedding is None:
        return parts
    embedding = f"{naming.model.embedding}.weight"
    names = {part.name for part in others if naming.parameter(f"{part.module}.weight") == embedding}
    if names and any(tie.on and embedding in (tie.source, tie.target) for tie in naming.model.ties):
        raise AdapterError(
            f"{adapter.path}: changes {listed(sorted(names))}, which the base ties to its head, and a LoRA would "
            "change the embedding alone; merge it into the base"
        )
    return [replace(part, kind="embedding") if part.name in names else part for part in parts]


def _part(adapter: Adapter, name: str, trained: Trained) -> Part:
    method, kind = METHODS[trained.method], OWN.get(trained.method)
    beside = adapter.trained.get(trained.owner)
    if kind == "bias" and (beside is None or beside.method != "lora"):
        how = beside.method if beside is not None else "nothing"
        raise refusal(adapter, trained, f", beside {how} of the weight")
    if kind is not None:
        rank = 0 if kind == "bias" else trained.rank
        return Part(name, trained.owner, kind, rank, float(trained.numbers["scale"]), own=True)
    if method.PARAMETER != "weight" or trained.dimensions not in (2, None):
        raise refusal(adapter, trained)
    embedding = any("embedding" in ending for roles in method.PEFT.values() for ending in roles)
    return Part(name, trained.owner, "embedding" if embedding else "linear", trained.form_rank)


def refusal(adapter: Adapter, trained: Trained, more: str = "") -> AdapterError:
    """What to say of an entry that a LoRA cannot hold."""
    return AdapterError(
        f"{adapter.path}: {trained.label} changes {trained.parameter} as {trained.method}{more}, for which a LoRA has "
        "no place; merge it into the base"
    )


def matrices(adapter: Adapter, part: Part, outputs: int, inputs: int, factor: float = 1.0) -> tuple[Array, ...]:
    """A and B times `factor`, or c of a bias, as PEFT's LoRA stores them, of an entry with a rank; the weight is
    (outputs, inputs). In the trained tensors' own dtype if nothing is computed, else in float64."""
    trained = adapter.trained[part.name]
    arrays = finite(adapter, part.name)
    if part.own:
        last = arrays["c"] if part.kind == "bias" else arrays["B"]
        last = last if factor == 1 else last.astype(np.float64) * factor
        return (last,) if part.kind == "bias" else (arrays["A"], last)
    if computes(trained) or factor != 1:
        arrays = {role: array.astype(np.float64) for role, array in arrays.items()}
    form = METHODS[trained.method].low_rank(arrays, trained.numbers, outputs)
    assert form is not None, part.name
    down, up = np.asarray(form.down_matrix(inputs)), np.asarray(form.up)
    up = up if factor == 1 else up * factor
    return (up.T, down.T) if part.kind == "embedding" else (down, up)


def computes(trained: Trained) -> bool:
    """Whether the method's form is more than its tensor in another order."""
    return len(trained.tensors) > 1 or "scale" in trained.numbers


def most_common(values: Iterable[float]) -> float:
    """The first of those that are there most often; 1 if there is none."""
    found = Counter(values).most_common(1)
    return found[0][0] if found else 1.0


def dtype_of(adapter: Adapter, parts: Iterable[Part], factors: Iterable[float]) -> str:
    """The dtype that holds all of it: the tensors' own if they are only moved, or multiplied by powers of two."""
    dtypes: set[str] = set()
    for part, factor in zip(parts, factors, strict=True):
        trained = adapter.trained[part.name]
        dtypes |= {info.dtype for info in trained.tensors.values()}
        if abs(math.frexp(factor)[0]) != 0.5 or (computes(trained) and not part.own):
            dtypes.add("F32")
    return "F32" if len(dtypes) > 1 else dtypes.pop()


def rounded(adapter: Adapter, part: Part, matrix: Array, dtype: str) -> tuple[Array, float]:
    """`matrix` in a dtype, and its relative error by that. Raises AdapterError if it does not fit."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(matrix, numpy_dtype(dtype))
    if found.dtype == matrix.dtype:
        return found, 0.0
    if not np.isfinite(np.asarray(found, np.float32)).all():
        raise AdapterError(f"{adapter.path}: {part.name} times its scale is more than {dtype} holds; merge it instead")
    return found, relative_error(found, matrix)


def relative_error(found: Array, wanted: Array) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    exact = np.asarray(wanted, np.float64)
    norm = float(np.square(exact).sum())  # np.linalg.norm would start threads for each of many small matrices
    return math.sqrt(float(np.square(found.astype(np.float64) - exact).sum()) / norm) if norm else 0.0


def without_form(adapter: Adapter, parts: Iterable[Part]) -> str:
    """The methods in it that are no LoRA, for messages."""
    return "+".join(dict.fromkeys(adapter.trained[part.name].method for part in parts if part.rank is None))


def refuse_biases(adapter: Adapter, parts: Iterable[Part], where: str) -> None:
    """Raise AdapterError if the LoRA changes biases (lora_bias), which `where` has no place for."""
    if biases := [part.name for part in parts if part.kind == "bias"]:
        raise AdapterError(
            f"{adapter.path}: changes biases (lora_bias of {listed(biases)}), for which {where} has no place; merge it "
            "into the base and convert that"
        )


def finite(adapter: Adapter, module: str) -> dict[str, Array]:
    """The trained tensors of a module by role; raises AdapterError if its training diverged."""
    arrays = adapter.arrays(module)
    for role, values in arrays.items():
        if not np.isfinite(np.asarray(values, np.float32)).all():
            info = adapter.trained[module].tensors[role]
            raise AdapterError(
                f"{info.path}: {info.name} holds infinite or NaN values; training diverged, take an earlier adapter"
            )
    return arrays
