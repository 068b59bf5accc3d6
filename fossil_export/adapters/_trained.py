"""What was trained in one module, and how the tensors of a file come to belong to one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS, ROWS, Field, Numbers, Shapes


@dataclass(frozen=True)
class Trained:
    """The trained tensors of one module, by the role they have in its method.

    `module` is the name the model had when it was trained (`model.layers.0.self_attn.q_proj`), and for another
    parameter than its weight that of the parameter; `method` is one of `METHODS`; `numbers` are what the config says of
    it, the rank as "r". `columns` says, by role, which columns of a matrix are meant, if not all are.
    """

    module: str
    method: str
    tensors: Mapping[str, TensorInfo]
    numbers: Numbers = field(default_factory=dict)
    columns: Mapping[str, slice] = field(default_factory=dict)

    @property
    def parameter(self) -> str:
        """The name of the parameter that changes."""
        own = METHODS[self.method].PARAMETER
        return f"{self.module}.weight" if own == "weight" else self.module

    @property
    def owner(self) -> str:
        """The module whose parameter that is."""
        return self.parameter.rpartition(".")[0]

    @property
    def dimensions(self) -> int | None:
        """How many the parameter has; None if its tensors go with two and with more."""
        return METHODS[self.method].dimensions(self.shapes)

    @property
    def is_rows(self) -> bool:
        """Whether its tensor has rows that take the place of the parameter's."""
        return self.method in ROWS

    @property
    def beside(self) -> Trained | None:
        """What it does to the bias of its module, if there is one; None if it leaves that as it is."""
        method = METHODS[self.method].beside(self.numbers)
        return replace(self, module=f"{self.module}.bias", method=method) if method is not None else None

    @property
    def block_rows(self) -> int:
        """Rows of the weight that must be merged together."""
        return int(self.numbers.get("block_rows") or METHODS[self.method].block_rows(self.shapes))

    @property
    def period(self) -> int:
        """Rows after which its tensors go on to other values (`period` of a method that has one), else 1: slabs lie
        within such a stretch, or have whole ones."""
        period = getattr(METHODS[self.method], "period", None)
        return 1 if period is None else int(period(self.shapes))

    @property
    def rank(self) -> int:
        """r; 0 for a method that has none."""
        return int(self.numbers.get("r", 0))

    @property
    def shapes(self) -> Shapes:
        return {
            role: (*info.shape[:-1], len(range(*self.columns[role].indices(info.shape[-1]))))
            if role in self.columns
            else info.shape
            for role, info in self.tensors.items()
        }

    def meant(self, role: str, array: Any) -> Any:
        """What is meant of the `array` of a role, which need give no more than rows when it is sliced."""
        return Columns(array, self.columns[role]) if role in self.columns else array

    @property
    def label(self) -> str:
        """The names of its tensors, for messages."""
        return " and ".join(info.name for info in self.tensors.values())

    @property
    def form_rank(self) -> int | None:
        """The rank of its low-rank form (`Method.low_rank`), None if its update depends on the weight."""
        return METHODS[self.method].form_rank(self.shapes)

    def mismatch(self, weight: tuple[int, int], more: Numbers | None = None) -> str | None:
        """Why it cannot belong to a weight of that shape (out, in), of which `more` numbers may be known; None if it
        can."""
        return METHODS[self.method].mismatch(self.shapes, {**self.numbers, **(more or {})}, weight)


@dataclass(frozen=True)
class Columns:
    """Some columns of a matrix, read with its rows."""

    whole: Any
    some: slice

    def __getitem__(self, rows: slice) -> Any:
        return self.whole[rows][:, self.some]


def formats() -> tuple[str, ...]:
    """Every `peft_type` that some method knows."""
    return tuple(dict.fromkeys(name for method in METHODS.values() for name in method.PEFT))


def methods_of(peft_type: str) -> dict[str, Mapping[str, str]]:
    """The methods of a `peft_type`, with the role of a tensor by its key's ending."""
    return {name: method.PEFT[peft_type] for name, method in METHODS.items() if peft_type in method.PEFT}


def fields_of(peft_type: str) -> dict[str, Field]:
    """The config's fields that the methods of a `peft_type` understand."""
    return {name: field for method in methods_of(peft_type) for name, field in METHODS[method].FIELDS.items()}


def is_index(methods: Mapping[str, Mapping[str, str]], ending: str, tensor: TensorInfo) -> bool:
    """Whether a tensor with this ending is a list of numbers of rows or columns for one of `methods`, not of values."""
    roles = [(name, endings[ending]) for name, endings in methods.items() if ending in endings]
    return any(role in getattr(METHODS[name], "INDEXES", ()) for name, role in roles) and len(tensor.shape) == 1


def methods_of_state_dicts() -> dict[str, Mapping[str, str]]:
    """The same for state dicts."""
    return {name: method.STATE_DICT for name, method in METHODS.items() if method.STATE_DICT}


def split_key(key: str, endings: Iterable[str]) -> tuple[str, str] | None:
    """Module and ending of a trained tensor's key; None for another tensor's."""
    found = [ending for ending in endings if key.endswith(f".{ending}") and len(key) > len(ending) + 1]
    return (key[: -len(max(found, key=len)) - 1], max(found, key=len)) if found else None


def trained_in(
    file: Path,
    module: str,
    tensors: Mapping[str, TensorInfo],
    methods: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, TensorInfo]] | None = None,
) -> Iterator[Trained]:
    """What `tensors`, by ending, are for `module`: each goes to the first of `methods` (roles by ending) that takes it.

    `shared` are tensors of all modules, by method and role. Raises AdapterError, which names the `file`.
    """
    for ending, info in tensors.items():
        if 0 in info.shape and not any(METHODS[name].EMPTY for name, roles in methods.items() if ending in roles):
            raise AdapterError(empty(f"{file}: shard {info.name} {list(info.shape)}"))
    left = dict(tensors)
    for name, endings in methods.items():
        own = {ending: info for ending, info in left.items() if ending in endings}
        if not own:
            continue
        roles = {endings[ending]: info for ending, info in own.items()}
        if len(roles) < len(own):
            names = " and ".join(info.name for info in own.values())
            raise AdapterError(f"{file}: holds {module} twice, as {names}; keep one")
        roles |= (shared or {}).get(name, {})
        shapes = {role: info.shape for role, info in roles.items()}
        numbers = METHODS[name].read(config, module, shapes, _where(file, own.values()))
        if numbers is not None:
            parameter = METHODS[name].PARAMETER
            yield Trained(module if parameter == "weight" else f"{module}.{parameter}", name, roles, numbers)
            left = {ending: info for ending, info in left.items() if ending not in own}
    if left:
        raise AdapterError(
            f"{_where(file, left.values())}: belongs to none of the methods that it may be of ({', '.join(methods)})"
        )


def _where(file: Path, tensors: Iterable[TensorInfo]) -> str:
    return f"{file}: shard " + " and ".join(f"{info.name} {list(info.shape)}" for info in tensors)


def empty(where: str) -> str:
    """The message for a tensor without values."""
    return f"{where} is empty; it was saved without being gathered (DeepSpeed ZeRO-3 or FSDP), save it again"


def refuse_mixtures(trained: Mapping[str, Trained], file: Path) -> None:
    """Raise AdapterError for modules of several methods whose tensors have the same names: no trainer saves them
    together."""
    found = {one.method for one in trained.values()}
    by_keys: dict[str, set[str]] = {}
    for name in found:
        by_keys.setdefault(repr([sorted(keys) for keys in METHODS[name].PEFT.values()]), set()).add(name)
    for names in by_keys.values():
        if len(names) > 1:
            raise AdapterError(f"{file}: mixes {' and '.join(sorted(names))} shards; one adapter has one variant")


def by_module(all_of_it: Iterable[Trained]) -> dict[str, Trained]:
    return {one.module: one for one in all_of_it}


def shared_of(peft_type: str) -> dict[str, dict[str, str]]:
    """Keys of tensors that all modules of a `peft_type` share: by method the role of each."""
    found = {name: dict(method.SHARED.get(peft_type, {})) for name, method in METHODS.items()}
    return {name: keys for name, keys in found.items() if keys}
