"""A reader of pickles that calls nothing: what a pickle would have called comes out as a `Call`, never as its result.

It knows the opcodes that Python writes for plain containers, numbers, text and calls in protocols 1 to 5, and of
protocol 0 those that it shares with Python 2's. Source: Lib/pickletools.py in CPython.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class BadPickleError(Exception):
    """It is cut, or holds what this reader does not know. The text goes on from a file's name."""


class CutError(BadPickleError):
    """It ends before its last opcode."""


@dataclass(frozen=True, slots=True)
class Name:
    """What a pickle would have imported."""

    module: str
    name: str

    def __str__(self) -> str:
        found = f"{self.module}.{self.name}"
        return found if found.isprintable() and len(found) <= 200 else f"{found[:200]!r}"


@dataclass(slots=True)
class Call:
    """What a pickle would have called, and with what."""

    function: Any
    arguments: tuple[Any, ...]


@dataclass(slots=True)
class Persistent:
    """What lies outside of the pickle: in PyTorch's files a storage, as a tuple that tells of it."""

    key: Any


_MARK = object()
MOST_STEPS = 5_000_000
"""Opcodes of a pickle: more than the names and places of a hundred thousand tensors take (40 each), and few enough that
what they make fits into a gigabyte, in seconds."""


def read_pickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """The value that the pickle at `start` tells of, and where it ends. Raises BadPickleError."""
    machine = _Machine(data, start)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise BadPickleError(f"is no sound pickle ({type(problem).__name__} at byte {machine.at})") from problem


class _Machine:
    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.at = data, start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = MOST_STEPS

    def run(self) -> Any:
        data, opcodes = self.data, _OPCODES
        while True:
            if self.at >= len(data):
                raise CutError("is cut: its pickle has no end")
            code = data[self.at]
            self.at += 1
            self.spend(1)
            if code == 0x2E:  # STOP
                return self.pop()
            found = opcodes.get(code)
            if found is None:
                raise BadPickleError(f"has the opcode {bytes([code])!r}, which is in no file of weights")
            found(self)

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise BadPickleError(f"has a pickle of more than {MOST_STEPS:,} steps, too many for names of tensors")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise CutError("is cut: its pickle ends early")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise CutError("is cut: its pickle ends early")
        found = self.data[self.at : end]
        self.at = end + 1
        return found.decode()

    def pop(self) -> Any:
        found = self.stack.pop()
        if found is _MARK:
            raise ValueError("a mark is no value")
        return found

    def to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pushed(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) < count or any(value is _MARK for value in values):
            raise IndexError("too few values")
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise TypeError("items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):
                raise BadPickleError("has a key that is no text; it is no state dict (a map of names to tensors)")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("items of what is no list")
        target.extend(values)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise TypeError("arguments that are no tuple")
        if function == ORDERED:
            self.push({})
            pairs = arguments[0] if arguments else ()
            self.spend(8 * len(pairs))  # a list that is named again and again
            for key, value in pairs:
                self.set_items([key, value])
        else:
            self.push(Call(function, arguments))

    def build(self) -> None:
        """Attributes of what is there: of a dict (`_metadata`) they are not its entries."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is not dict:
            self.stack[-1] = Call(ATTRIBUTES, (target, state))


ORDERED = Name("collections", "OrderedDict")
ATTRIBUTES = Name("", "attributes")
"""Stands for what sets attributes of a value."""


def _global(m: _Machine) -> None:
    module = m.line()
    m.push(Name(module, m.line()))


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a name that is no text")
    m.push(Name(module, name))


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


def _dict(m: _Machine) -> None:
    pairs = m.to_mark()
    m.push({})
    m.set_items(pairs)


def _float(m: _Machine) -> None:
    import struct

    m.push(struct.unpack(">d", m.take(8))[0])


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _old_text(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)).decode("latin-1"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)))


_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.to_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    ord("J"): lambda m: m.push(m.number(4, signed=True)),
    0x8A: lambda m: m.push(m.number(m.number(1), signed=True)),  # LONG1
    ord("G"): _float,
    ord("X"): _text(4),
    0x8C: _text(1),
    0x8D: _text(8),
    ord("U"): _old_text(1),
    ord("T"): _old_text(4),
    ord("C"): _bytes(1),
    ord("B"): _bytes(4),
    0x8E: _bytes(8),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.to_mark()),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.to_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.to_mark())),
    0x85: lambda m: m.pushed(1),
    0x86: lambda m: m.pushed(2),
    0x87: lambda m: m.pushed(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.to_mark()),
    ord("h"): lambda m: m.push(m.memo[m.number(1)]),
    ord("j"): lambda m: m.push(m.memo[m.number(4)]),
    ord("g"): lambda m: m.push(m.memo[int(m.line())]),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    ord("p"): lambda m: m.put(int(m.line())),
    0x94: lambda m: m.put(len(m.memo)),
    ord("c"): _global,
    0x93: _stack_global,
    ord("Q"): lambda m: m.push(Persistent(m.pop())),
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # NEWOBJ
    ord("b"): _Machine.build,
}
