"""Damage to the head of a GGUF file: its metadata, and its table of tensors."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_bytes

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    64,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
)
NUMBERS += ((1 << 63) - 1, (1 << 64) - 1)
TEXTS = (
    "",
    "x",
    "llama",
    "qwen2",
    "gpt2",
    "bloom",
    "adapter",
    "\x1b[2J",
    "é",
    "\ud800",
    "a" * 5000,
    "general.alignment",
)


@dataclass
class Head:
    """What stands before the tensors: entries (key, type, raw value) and rows (name, sizes, type, offset)."""

    entries: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    version: int = 3
    counts: list[int] = field(default_factory=list)

    def encoded(self, alignment: int = 32) -> bytes:
        tensors, pairs = self.counts or (len(self.rows), len(self.entries))
        found = struct.pack("<4sIQQ", b"GGUF", self.version, tensors, pairs)
        for key, kind, raw in self.entries:
            found += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + raw
        for name, sizes, kind, offset in self.rows:
            found += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
            found += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)
        return found + bytes(-len(found) % alignment)


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def parsed(data: bytes) -> tuple[Head, bytes]:
    """The head of a sound file, and the tensors' bytes."""
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    at, head = 24, Head(version=version)

    def take(form: str) -> Any:
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found[0] if len(found) == 1 else list(found)

    def string() -> bytes:
        nonlocal at
        count = take("Q")
        at += count
        return data[at - count : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            at += struct.calcsize(SCALARS[kind])

    for _ in range(pairs):
        key, kind = string(), take("I")
        start = at
        skip(kind)
        head.entries.append((key, kind, data[start:at]))
    for _ in range(tensors):
        name, count = string(), take("I")
        sizes = [take("Q") for _ in range(count)]
        head.rows.append([name, sizes, take("I"), take("Q")])
    return head, data[-(-at // 32) * 32 :]


def _value(random: Random, depth: int = 0) -> tuple[int, bytes]:
    """Some type, and a value of it."""
    kind = random.choice((*SCALARS, 8, 9, 13, 255))
    if kind == 8:
        return kind, text(random.choice(TEXTS))
    if kind == 9 and depth < 3:
        count = random.choice((0, 1, 2, 3, 5000))
        inner, raw = _value(random, depth + 1)
        told = count if random.random() < 0.8 else random.choice(NUMBERS)
        return kind, struct.pack("<IQ", inner, told & (1 << 64) - 1) + raw * count
    if kind in (6, 12):
        return kind, struct.pack(
            f"<{SCALARS[kind]}", random.choice((0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf")))
        )
    if kind in SCALARS:
        size = struct.calcsize(SCALARS[kind])
        return kind, (random.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return kind, random.randbytes(8)


def damage_entry(head: Head, random: Random, tokenizer: bool) -> str:
    known = [n for n, (key, *_) in enumerate(head.entries) if key.startswith(b"tokenizer") is tokenizer]
    at = random.choice(known)
    key, kind, raw = head.entries[at]
    way = random.choice(
        ("value", "value", "value", "number", "number", "number", "gone", "double", "key", "counts", "bytes")
    )
    if way == "number" and kind in SCALARS and SCALARS[kind] not in "f?d":
        size = struct.calcsize(SCALARS[kind])
        old = int.from_bytes(raw, "little")
        new = random.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2)) & (1 << 8 * size) - 1
        head.entries[at] = key, kind, new.to_bytes(size, "little")
        return f"{key.decode()} is {new}"
    if way == "gone":
        del head.entries[at]
    elif way == "double":
        head.entries.insert(random.randrange(len(head.entries)), head.entries[at])
    elif way == "key":
        new_key = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        head.entries[at] = random.choice((new_key, key + b"x", b"\xff\xfe")), kind, raw
    elif way == "counts":
        head.counts = [len(head.rows), len(head.entries)]
        head.counts[random.randrange(2)] = random.choice((*NUMBERS, len(head.entries) - 1, len(head.entries) + 1))
    elif way == "bytes":
        found, how = damage_bytes(raw, random)
        head.entries[at] = key, kind, found
        return f"{key.decode()}: {how}"
    else:
        head.entries[at] = key, *_value(random)
        return f"{key.decode()} is of type {head.entries[at][1]}: {head.entries[at][2][:40]!r}"
    return f"{key.decode()}: {way}"


def damage_table(head: Head, random: Random) -> str:
    at = random.randrange(len(head.rows))
    name, sizes, kind, offset = row = head.rows[at]
    way = random.choice(("name", "size", "size", "axes", "kind", "kind", "offset", "offset", "gone", "double", "order"))
    if way == "name":
        other = random.choice(head.rows)[0]
        row[0] = random.choice(
            (other, name + b"x", b"", b"\xff", b"x" * 5000, name.replace(b"0", b"1"), b"output.weight")
        )
    elif way == "size":
        axis = random.randrange(len(sizes))
        row[1] = list(sizes)
        row[1][axis] = random.choice((*NUMBERS, sizes[axis] - 1, sizes[axis] + 256, sizes[axis] // 2, sizes[axis] * 2))
    elif way == "axes":
        row[1] = random.choice(
            ([*sizes, 1], [1, *sizes], [], sizes[::-1], [sizes[0]], [1, 1, 1, 1, 1], [2**63, 2], [1] * 70000)
        )
    elif way == "kind":
        row[2] = random.choice((*range(45), 255, (1 << 32) - 1))
    elif way == "offset":
        row[3] = random.choice((*NUMBERS, offset + 32, abs(offset - 32), offset + 1, random.choice(head.rows)[3]))
    elif way == "gone":
        del head.rows[at]
    elif way == "double":
        head.rows.insert(random.randrange(len(head.rows)), list(row))
    else:
        random.shuffle(head.rows)
    return f"tensor {name.decode()} {sizes} {kind} {offset}: {way} {str(row[1:])[:120]}"
