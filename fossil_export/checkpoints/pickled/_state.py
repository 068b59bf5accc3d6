"""From what a pickle tells of to the tensors of a state dict: where each lies in its storage.

Sources: `_rebuild_tensor_v2`, `_rebuild_tensor_v3`, `_rebuild_parameter` in torch/_utils.py; `_rebuild_from_type_v2` in
torch/_tensor.py; the classes of storages in torch/__init__.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fossil_export.checkpoints._dtypes import BITS
from fossil_export.checkpoints.pickled._machine import ATTRIBUTES, BadPickleError, Call, Name, Persistent

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_MOST_AXES = 64
"""PyTorch's own bound."""
_LONGEST = 4096
"""Characters of a name."""
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_TENSOR_CLASSES = ("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "net", "ema", "params")


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors lie in: the `key` they have in the file, how many there are, and how many an element of it
    has (1 if it is told in bytes)."""

    key: str
    nbytes: int
    width: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a state dict: its first element and its strides, in elements of its storage."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    first: int
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last that it has, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


def tensors_of(state: Any) -> Iterator[Placed]:
    """The tensors of a state dict, in its order. Raises BadPickleError for anything else that is in it."""
    if isinstance(state, Call):
        raise BadPickleError(_whole(state))
    if type(state) is not dict or not state:
        raise BadPickleError("is not a state dict (a map of names to tensors); save model.state_dict() alone")
    inner = [name for name, value in state.items() if type(value) is dict]
    if inner:
        found = next((name for name in _WRAPPERS if name in inner), inner[0])
        raise BadPickleError(
            f"is a checkpoint with more than weights in it ({', '.join(map(str, list(state)[:4]))}); save what is "
            f"under {found!r} alone, as safetensors"
        )
    for name, value in state.items():
        if type(name) is not str:
            raise BadPickleError(f"has the key {name!r}, which is no text; it is no state dict")
        if name == "__metadata__" or len(name) > _LONGEST:
            raise BadPickleError(f"has a tensor {name[:40]!r}, which safetensors cannot hold; rename it")
        if type(value) is str and name.rpartition(".")[2] == "weight_format" and value == "row":
            continue  # how bitsandbytes 0.37 to 0.42 said that 8-bit rows lie as they are
        try:
            name.encode()
            yield _tensor(name, value)
        except BadPickleError as problem:
            raise BadPickleError(f"tensor {name!r} {problem}") from problem
        except (TypeError, ValueError, UnicodeEncodeError) as problem:
            raise BadPickleError(f"tensor {name!r} is told of as PyTorch never does; fetch the file again") from problem


def _tensor(name: str, value: Any) -> Placed:
    if not isinstance(value, Call):
        raise BadPickleError(f"is no tensor but {type(value).__name__}; save model.state_dict() alone, as safetensors")
    function, arguments = _called(value), value.arguments
    if function in _PARAMETERS and isinstance(arguments[0], Call):
        inner, _, hooks = arguments[:3]
        _check_hooks(hooks)
        function, arguments = _called(inner), inner.arguments
    if function in ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"):
        inner, kind, its, _ = arguments
        if _text(kind) not in _TENSOR_CLASSES:
            raise BadPickleError(
                f"is a {_text(kind)}, which only its own library can read; save the model as plain tensors"
            )
        function, arguments = _called(Call(inner, its)), its
    if function in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        if function.endswith("_rebuild_tensor"):
            arguments = (*arguments, False, None)
        storage, first, shape, strides, gradient, hooks, *extras = arguments
        found, dtype = _storage(storage)
        if dtype is None:
            raise ValueError("a typed tensor in an untyped storage")
    elif function == "torch._utils._rebuild_tensor_v3":
        storage, first, shape, strides, gradient, hooks, kind, *extras = arguments
        found, _ = _storage(storage)
        dtype = _DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            raise BadPickleError(
                f"is of the dtype {_text(kind)}, which safetensors does not have; save it in another one"
            )
    elif function.startswith("torch."):
        raise BadPickleError(
            f"is not a plain tensor ({function}): quantized, sparse or of another device; save it as a plain one"
        )
    else:
        raise BadPickleError(
            f"is made by {function}: the file may hold code, and nothing of it was run; ask for safetensors"
        )
    _check_hooks(hooks)
    if type(gradient) is not bool:
        raise ValueError("no answer to whether it has a gradient")
    if len(extras) > 1:
        raise ValueError("more arguments than there are")
    if any(extra for extra in extras):
        raise BadPickleError("is a conjugate or negative view; save it with .contiguous()")
    placed = Placed(name, dtype, _sizes(shape), found, first, _sizes(strides))
    if type(first) is not int or first < 0 or len(placed.shape) != len(placed.strides):
        raise ValueError("no place")
    if (first + placed.span) * (BITS[dtype] // 8) > found.nbytes and placed.span:
        raise BadPickleError("reaches past the end of its storage; the file is damaged, fetch it again")
    return placed


def _check_hooks(value: Any) -> None:
    """PyTorch saves none."""
    if value is not None and (type(value) is not dict or value):
        raise ValueError("hooks of gradients")


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, Call) and _text(value.function) == "torch.Size":
        (value,) = value.arguments
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_AXES:
        raise ValueError("no sizes of a tensor")
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in value):
        raise ValueError("sizes that are no natural numbers")
    return tuple(value)


def _text(value: Any) -> str:
    """The name of a class or dtype. Anything else is not looked into: it may be as deep as its writer liked."""
    if not isinstance(value, Name):
        raise ValueError("no name")
    return str(value)


def _storage(value: Any) -> tuple[Storage, str | None]:
    """A storage and the dtype of its elements, None if it is told in bytes."""
    if not isinstance(value, Persistent):
        raise ValueError("no storage")
    what, kind, key, _, count, *view = value.key
    if what != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("no storage")
    if any(part is not None for part in view):
        raise BadPickleError("lies in a view of a storage; load it with PyTorch and save it again")
    if _text(kind) in _UNTYPED:
        return Storage(key, count, 1), None
    if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in _STORAGES:
        raise BadPickleError(f"is stored as {_text(kind)}, which safetensors does not have; save it in another one")
    dtype = _STORAGES[kind.name]
    width = BITS[dtype] // 8
    return Storage(key, count * width, width), dtype


def _whole(state: Call) -> str:
    """What is wrong with a file that is one object."""
    function = _called(state)
    if function.startswith("torch._"):
        return "is one tensor, not a state dict (a map of names to tensors); save model.state_dict() alone"
    return (
        f"is not a pickle of plain tensors but an object of {function}; it may hold code and was not run; save "
        "model.state_dict() alone, as safetensors"
    )


def _called(call: Call) -> str:
    """The name of what a pickle would have called."""
    found: Any = call
    while isinstance(found, Call):
        found = found.arguments[0] if found.function == ATTRIBUTES else found.function
    if isinstance(found, Persistent) and type(found.key) is tuple and found.key[:1] == ("module",):
        found = found.key[1]
    return str(found) if isinstance(found, Name) else "what is no function"
