"""What a method is: the words of its files, the rows it changes, its update, its low-rank form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from fossil_export.methods._low_rank import LowRank

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of one module, by role."""

Arrays = Mapping[str, Any]
"""The same tensors' values: NumPy arrays, PyTorch tensors, or what gives NumPy arrays if it is sliced."""

Numbers = Mapping[str, Any]
"""What the config says of a module: "r", its rank, "scale", by which a linear update is multiplied, "block_rows" if the
shapes do not tell them (`Method.block_rows`), and whatever else the method needs."""

Combination = Literal["sum", "order", "alone"]
"""How an update goes together with others of the same weight. "sum": it does not depend on the weight, and may be
scaled. "order": it does, and sees what those before it gave. "alone": it cannot be combined."""


@dataclass(frozen=True)
class Field:
    """A field of adapter_config.json that a method understands: which values `holds` takes, in words `expected`, and
    `default`, PEFT's own, for a config without it. `why` says why other values cannot be merged."""

    expected: str = "anything"
    holds: Callable[[Any], bool] = lambda value: True
    default: Any = None
    why: str = ""


def unset(why: str) -> Field:
    """A field that must not be set; `why` says what its setting does."""
    return Field("nothing", lambda value: value in (None, False, {}, []), None, why)


def neutral(*names: str) -> dict[str, Field]:
    """Fields that only say how training began or ran."""
    return {name: Field() for name in names}


POSITIVE = Field(
    "a positive integer", lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0
)


Narrow = Callable[[Arrays, Numbers, int, int, Any], Any]
"""What a method may have besides: narrow(arrays, numbers, start, count, out), its update of `count` rows from row
`start` on if it takes nothing of the weight: (count, in), or fewer columns that are repeated and cut at `in`. It may
be put into `out` (count, in), memory that is used again, if that is not None. Such a sum takes one pass. `update` gives
the same values, and `add` is plain."""

_Add = TypeVar("_Add", bound=Callable[..., None])


def plain(add: _Add) -> _Add:
    """Says of a method's `add` that it does `weight += update(…)` and nothing else, so that a sum which is rounded need
    not be stored in between."""
    add.plain = True  # type: ignore[attr-defined]
    return add


def narrow_of(method: Any) -> Narrow | None:
    """A method's `narrow`, if it has one: see `Narrow`.

    A class that has an `update` of its own, and `narrow` from one that it is derived from, has none.
    """
    for owner in type(method).__mro__:
        if "update" in vars(owner) and "narrow" not in vars(owner):
            return None
        if "narrow" in vars(owner):
            break
    found: Narrow | None = getattr(method, "narrow", None)
    return found


class Method(Protocol):
    """One way to train beside a weight W (out, in). A module with these names will do; so will an object.

    Weight rows are (n, in), and `start` is the number of the first of them in the whole weight. The arrays are NumPy's
    or PyTorch's, and the code uses only what both understand, so that one formula serves CPU and GPU.
    """

    @property
    def PEFT(self) -> Mapping[str, Mapping[str, str]]:
        """How PEFT's keys end after the module's name, and the role of the tensor, by `peft_type`:
        {"MISS": {"miss_block": "D"}}. Methods may share endings; `read` tells them apart. A role that begins with # may
        be of whole numbers, which come as int64."""

    @property
    def STATE_DICT(self) -> Mapping[str, str]:
        """The same for state dicts of other trainers, which have no config."""

    @property
    def SHARED(self) -> Mapping[str, Mapping[str, str]]:
        """Keys of tensors that all modules share, and their roles, by `peft_type`:
        {"VERA": {"base_model.vera_A": "A"}}."""

    @property
    def PARAMETER(self) -> str:
        """The parameter of the module that changes, "weight" but for few."""

    @property
    def COMBINES(self) -> Combination:
        """See `Combination`."""

    @property
    def EMPTY(self) -> bool:
        """Whether a module may have tensors without values, because training dropped all of it."""

    @property
    def FIELDS(self) -> Mapping[str, Field]:
        """Fields of the config that are this method's own. One that no method of a `peft_type` knows stops the
        reading."""

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        """The numbers of `module`, with tensors of these shapes; None if it is another method's.

        `config` is empty for a state dict. Raises AdapterError, in a line that begins with `where`, for tensors that
        the config contradicts.
        """

    def dimensions(self, shapes: Shapes) -> int | None:
        """How many dimensions the parameter has: 2; 1 for a bias, more for a convolution. None if the tensors are the
        same for two and more, those of a matrix (out, in · kernel)."""

    def beside(self, numbers: Numbers) -> str | None:
        """The method by which the module's bias changes with its weight, if the base has one: what acts on outputs
        acts on it too. It gets the same tensors and numbers. None for most."""

    def block_rows(self, shapes: Shapes) -> int:
        """Rows of the weight that must be merged together; slabs are cut at multiples of it."""

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        """Why these tensors cannot belong to a weight of that shape (out, in); None if they can."""

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """What rows [start, stop) need of the tensors: for them these are the tensors of a weight that begins at row
        `start`."""

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        """ΔW (n, in) for the rows `weight`, which stay as they are."""

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        """Make W' of the rows `weight` in place, in the trainer's own order of operations."""

    def form_rank(self, shapes: Shapes) -> int | None:
        """The rank of the form that `low_rank` gives; None if it gives none."""

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        """The update of a weight with so many `outputs` as one that does not look at it, y = W x + up · down(x);
        None for a method whose update depends on the weight."""
