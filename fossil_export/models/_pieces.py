"""What transformers' operations do to tensors, worked out on the numbers of their rows.

A tensor is seen as rows: its last dimension is a row's width, and what comes before numbers the rows; of a tensor with
one dimension each element is a row. All operations but a transposition move whole rows. Source: the `ConversionOps` in
transformers/core_model_loading.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fossil_export.models._architecture import Operation
from fossil_export.models._inventory import Conversion

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Run:
    """`count` rows of a parameter: those of the stored tensor `name` from row `first` on, in the same order."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Pieces:
    """A parameter of `shape` whose rows lie in stored tensors: `runs`, in the order of its rows.

    With an `order` (groups, outer, inner) the rows of the only run are, as torch has it, its
    view(groups, outer, inner, …).transpose(1, 2).
    """

    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    order: tuple[int, int, int] | None = None


class Unknown(Exception):
    """These operations cannot be worked out from names and shapes; the text says which one."""


def pieces_of(
    made: Conversion,
    parameter: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    known: Mapping[str, tuple[int, ...]] | None = None,
) -> Pieces:
    """Where `parameter`, one of `made`'s, lies among stored tensors of `shapes`.

    `config` is the model's config.json; `known` are the shapes of its parameters, where they are known. Raises Unknown.
    """
    import numpy as np

    names = [name for source in sorted(made.stored) for name in made.stored[source]]
    starts: dict[str, int] = {}
    values: dict[str, list[Array]] = {}
    total = 0
    for source in sorted(made.stored):
        for name in made.stored[source]:
            lead = shapes[name][:-1] if len(shapes[name]) > 1 else shapes[name]
            count = int(np.prod(lead, dtype=np.int64))
            starts[name] = total
            values.setdefault(made.rule.sources[source], []).append(
                np.arange(total, total + count, dtype=np.int64).reshape(lead)
            )
            total += count
    ranks = {len(shapes[name]) for name in names}
    widths = {shapes[name][-1] for name in names if len(shapes[name]) > 1}
    if len(ranks) > 1 or len(widths) > 1:
        raise Unknown(f"{names[0]} and {names[-1]} have other shapes")
    found: dict[str, Array | list[Array]] = dict(values)
    for operation in made.operations:
        try:
            found = _APPLY.get(operation.name, _refuse)(_Step(operation, made, found, config, known))
        except (IndexError, TypeError, ValueError) as problem:  # NumPy's, for what does not go together
            raise Unknown(f"{operation.name}, for which tensors are missing or have other shapes") from problem
    parameters = made.parameters
    targets = made.rule.targets
    by_name = {
        next((full for full, target in zip(parameters, targets, strict=False) if target == key), key): value
        for key, value in found.items()
    }
    if parameter not in by_name:
        raise Unknown(made.operations[-1].name)
    rows = _one(by_name[parameter])
    width = tuple(widths) if max(ranks) > 1 else ()
    return _pieces(rows, starts, width)


@dataclass(frozen=True)
class _Step:
    operation: Operation
    made: Conversion
    values: dict[str, Array | list[Array]]
    config: Mapping[str, Any]
    known: Mapping[str, tuple[int, ...]] | None

    def dim(self, rows: Array) -> int:
        """Where it works; rows have no last dimension, which is their width."""
        dim = int(self.operation.options.get("dim", 0))
        if not 0 <= dim < rows.ndim:
            raise Unknown(f"{self.operation.name} along the last dimension")
        return dim


def _one(value: Array | list[Array]) -> Array:
    if isinstance(value, list):
        if len(value) != 1:
            raise Unknown("several tensors in the place of one")
        return value[0]
    return value


def _chunk(step: _Step) -> dict[str, Array | list[Array]]:
    import numpy as np

    if step.operation.options.get("num_shards_attribute"):
        raise Unknown("Chunk by a field of the config")
    (value,) = step.values.values()
    rows, targets = _one(value), step.made.rule.targets
    dim = step.dim(rows)
    if rows.shape[dim] % len(targets):
        raise Unknown("Chunk into unequal parts")
    return dict(zip(targets, np.split(rows, len(targets), axis=dim), strict=True))


def _split(step: _Step) -> dict[str, Array | list[Array]]:
    import numpy as np

    (value,) = step.values.values()
    rows, targets = _one(value), step.made.rule.targets
    sizes = [(step.known or {}).get(parameter) for parameter in step.made.parameters]
    if any(size is None for size in sizes):
        raise Unknown("Split by the sizes of its parts")
    dim = step.dim(rows)
    ends = np.cumsum([size[dim] for size in sizes if size is not None])
    if ends[-1] != rows.shape[dim]:
        raise Unknown("Split into parts of other sizes")
    return dict(zip(targets, np.split(rows, ends[:-1], axis=dim), strict=True))


def _concatenate(step: _Step) -> dict[str, Array | list[Array]]:
    import numpy as np

    parts: list[Array] = []
    for source in step.made.rule.sources:
        value = step.values.get(source, [])
        parts += value if isinstance(value, list) else [value]
    return {step.made.rule.targets[0]: np.concatenate(parts, axis=step.dim(parts[0]))}


def _stack(step: _Step) -> dict[str, Array | list[Array]]:
    import numpy as np

    # Between a list's items and the last dimension there is one more now.
    dim = int(step.operation.options.get("dim", 0))
    stacked = {key: np.stack(value if isinstance(value, list) else [value], dim) for key, value in step.values.items()}
    if len(stacked) == 1:
        return {step.made.rule.targets[0]: next(iter(stacked.values()))}
    return dict(stacked)


def _interleave(step: _Step) -> dict[str, Array | list[Array]]:
    (value,) = step.values.values()
    rows = _one(value)
    dim = step.dim(rows)
    halves = [2, rows.shape[dim] // 2] if step.operation.options.get("inverse") else [rows.shape[dim] // 2, 2]
    shape = [*rows.shape[:dim], *halves, *rows.shape[dim + 1 :]]
    return {step.made.rule.targets[0]: rows.reshape(shape).swapaxes(dim, dim + 1).reshape(rows.shape)}


def _permute(step: _Step) -> dict[str, Array | list[Array]]:
    options, config = step.operation.options, step.config
    part = config.get(options.get("subconfig_key") or "")
    heads = (part if isinstance(part, dict) else config).get("num_attention_heads")
    wanted = options.get("permute_layer_names")
    sources, targets = step.made.rule.sources, step.made.rule.targets
    result: dict[str, Array | list[Array]] = {}
    for key, value in step.values.items():
        rows = _one(value)
        if wanted is None or any(name in key for name in wanted):
            if not isinstance(heads, int) or heads < 1 or rows.ndim != 1 or len(rows) % (2 * heads):
                raise Unknown("PermuteForRope by a number of heads")
            half = len(rows) // heads // 2
            shape = (heads, 2, half) if options.get("inverse") else (heads, half, 2)
            rows = rows.reshape(shape).swapaxes(1, 2).reshape(-1)
        result[targets[0] if len(sources) == len(targets) == 1 else key] = rows
    return result


def _refuse(step: _Step) -> dict[str, Array | list[Array]]:
    raise Unknown(step.operation.name)


_APPLY = {
    "Chunk": _chunk,
    "Split": _split,
    "Concatenate": _concatenate,
    "MergeModulelist": _stack,
    "Interleave": _interleave,
    "PermuteForRope": _permute,
}


def _pieces(rows: Array, starts: Mapping[str, int], width: tuple[int, ...]) -> Pieces:
    """The rows of a parameter by the stored tensors, which begin at rows `starts`."""
    import numpy as np

    flat = rows.reshape(-1)
    shape = (*rows.shape, *width)
    names, begins = list(starts), np.array(list(starts.values()))
    if len(flat) == 0:
        raise Unknown("tensors without rows")
    order = None
    if len(names) == 1 and (np.diff(flat) < 0).any():
        order, flat = _order(flat), np.sort(flat)
    runs: list[Run] = []
    edges = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
    for start, stop in pairwise(edges):
        at = start
        while at < stop:  # a run of numbers may go on into the next tensor
            number = int(np.searchsorted(begins, flat[at], side="right")) - 1
            end = starts[names[number + 1]] if number + 1 < len(names) else None
            count = stop - at if end is None else min(stop - at, end - int(flat[at]))
            runs.append(Run(names[number], int(flat[at]) - int(begins[number]), count))
            at += count
    if order is not None and len(runs) > 1:
        raise Unknown("rows in another order, between those of others")
    return Pieces(shape, tuple(runs), order)


def _order(rows: Array) -> tuple[int, int, int]:
    """How rows that lie one after another are ordered. Raises Unknown."""
    import numpy as np

    numbers = rows - rows.min()
    inner = int(numbers[1]) - int(numbers[0]) if len(numbers) > 1 else 1
    drops = np.flatnonzero(np.diff(numbers) < 0)
    outer = int(drops[0]) + 1 if len(drops) else len(numbers)
    if inner > 0 and len(numbers) % (inner * outer) == 0:
        groups = len(numbers) // (inner * outer)
        wanted = np.arange(len(numbers)).reshape(groups, outer, inner).swapaxes(1, 2).reshape(-1)
        if (numbers == wanted).all():
            return groups, outer, inner
    raise Unknown("rows in an order of their own")
