"""What a merge does to a tensor: the updates of trained modules, at their weights, in the matrices that it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fossil_export.adapters import Trained
from fossil_export.checkpoints._dtypes import FLOATS, element_count
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints.layouts import Matrix, Order, ReadRows, Rows, Transposed
from fossil_export.errors import MergeError
from fossil_export.merging._survival import group_rows
from fossil_export.methods import METHODS, Method, Numbers


@dataclass(frozen=True)
class Change:
    """`weight` times the update of `trained`, a module of the plan's adapter number `adapter`, goes `into` a matrix."""

    adapter: int
    trained: Trained
    into: Matrix
    weight: float = 1.0

    @property
    def method(self) -> Method:
        return METHODS[self.trained.method]

    def numbers(self, dtype: str, brought: bool) -> Numbers:
        """Those of the module, with what a method may have to know of the weight that it begins from: the "dtype" that
        it is stored in, whether the adapter has "brought" it, and whether it lies "transposed" (Conv1D)."""
        return {**self.trained.numbers, **weight_numbers(self.into, dtype, brought)}


def weight_numbers(matrix: Matrix, dtype: str, brought: bool) -> dict[str, object]:
    """See `Change.numbers`."""
    return {"dtype": dtype, "brought": brought, "transposed": isinstance(matrix, Transposed)}


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor, from `first` on, have the values of `source`, a whole tensor of the plan's adapter number
    `adapter`, or a slice of one (`slice_of`).

    With an `order` these are rows as the matrix has them, to be stored in that order. What lies `above` another whole
    tensor of the same adapter goes before that.
    """

    first: int
    source: TensorInfo
    order: Order | None = None
    adapter: int = 0
    above: bool = False

    @property
    def last(self) -> int:
        return self.first + element_count(self.source.shape)

    @property
    def span(self) -> tuple[int, int]:
        return self.first, self.last

    def read(self, rows_of: ReadRows, first: int, shape: tuple[int, ...]) -> Rows:
        """Its values for the tensor's elements from `first` on, as they are stored, in an array of this `shape`.

        With an order it must be whole groups of rows.
        """
        count = element_count(shape)
        found = rows_of(slice_of(self.source, first - self.first, count, shape), 0, shape[0])
        if self.order is None:
            return found
        width = (self.last - self.first) // self.order.rows
        stored: Rows = self.order.stored(found[:].reshape(-1, width)).reshape(shape)
        return stored

    def check(self, tensor: TensorInfo) -> None:
        """Raise MergeError unless it has its place in this tensor."""
        where = f"{self.source.path}: {self.source.name} {list(self.source.shape)}"
        target = f"part of {tensor.name} {list(tensor.shape)}"
        if self.first < 0 or self.last > element_count(tensor.shape):
            raise MergeError(f"{where} does not fit as {target}; name the base model it was trained from with --base")
        if tensor.dtype not in FLOATS or self.source.dtype not in FLOATS:
            raise MergeError(
                f"{where} is {self.source.dtype} and would be {target}, which is {tensor.dtype}; only floats can be "
                "parts: the base is quantized, or its files are damaged"
            )
        if self.order is not None and (self.last - self.first) % self.order.rows:
            raise MergeError(
                f"{where} does not have the {self.order.rows} rows that lie in another order in {target}; name the "
                "base model it was trained from with --base"
            )


@dataclass(frozen=True)
class Part:
    """Elements [first, last) of a tensor: one matrix with its `changes`, or values that stay as they are; those of the
    `piece`, if there is one, else those of the tensor's source.

    They are cut into `rows`: those of the matrix, however it lies; those of a piece in another order; a tensor of two
    dimensions' own; else elements.
    """

    first: int
    last: int
    rows: int
    changes: tuple[Change, ...] = ()
    piece: Piece | None = None

    @property
    def matrix(self) -> Matrix:
        """What the changes go into."""
        return self.changes[0].into

    @property
    def width(self) -> int:
        """Elements of a row."""
        return (self.last - self.first) // max(1, self.rows)

    @property
    def sampled(self) -> int:
        """Rows that are merged and measured together."""
        return group_rows(math.lcm(*(change.trained.block_rows for change in self.changes)))

    @property
    def periods(self) -> set[int]:
        """Numbers of rows of which slabs must have a multiple, or a part that divides them."""
        return {count for change in self.changes if (count := change.trained.period) > 1}

    @property
    def unit(self) -> int:
        """Rows that must not be cut apart."""
        return self.whole_rows(self.sampled)

    def whole_rows(self, rows: int) -> int:
        """Rows that must not be cut apart, if the changes want `rows` of them at once."""
        if self.changes:
            return self.matrix.unit(rows)
        return self.piece.order.group if self.piece is not None and self.piece.order is not None else 1

    @property
    def dtype(self) -> str:
        """Of the rows that the changes are added to."""
        return self.matrix.dtype if self.piece is None else self.piece.source.dtype

    def matrix_rows(self, rows_of: ReadRows, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the matrix before the changes."""
        if self.piece is None:
            return self.matrix.read(rows_of, start, stop)
        piece = self.piece

        def in_piece(info: TensorInfo, start: int, stop: int) -> Rows:
            width = element_count(info.shape[1:])
            return piece.read(rows_of, start * width, (stop - start, *info.shape[1:]))

        return self.matrix.read(in_piece, start, stop)

    def unchanged_rows(self, source: TensorInfo, rows_of: ReadRows, start: int, stop: int) -> Rows:
        """Rows [start, stop) of a part without changes, whose tensor has this source."""
        first, shape = self.first + start * self.width, (stop - start, self.width)
        if self.piece is not None:
            return self.piece.read(rows_of, first, shape)
        return rows_of(slice_of(source, first, shape[0] * shape[1], shape), 0, shape[0])


def parts_of(shape: tuple[int, ...], changes: Sequence[Change], pieces: Sequence[Piece] = ()) -> Iterator[Part]:
    """A tensor of this shape, cut at the edges of its pieces and of the matrices in it that change."""
    count = element_count(shape)
    if not changes and not pieces:
        yield Part(0, count, shape[0] if len(shape) == 2 else count)
        return
    spans: dict[tuple[int, int], tuple[list[Change], list[Piece]]] = {}
    for change in changes:
        spans.setdefault(change.into.span, ([], []))[0].append(change)
    for piece in pieces:
        spans.setdefault(piece.span, ([], []))[1].append(piece)
    end = 0
    for (first, last), (own, values) in sorted(spans.items(), key=lambda entry: entry[0]):
        assert first >= end and len(values) < 2, f"two parts of a tensor overlap at its element {first}"
        if first > end:
            yield Part(end, first, first - end)
        brought = values[0] if values else None
        rows = last - first
        if own:
            rows = own[0].into.shape[0]
        elif brought is not None and brought.order is not None:
            rows = brought.order.rows
        yield Part(first, last, rows, tuple(own), brought)
        end = last
    if end < count:
        yield Part(end, count, count - end)
