"""Damage to the files of `torch.save`: the opcodes of their pickles, and the archive that these lie in."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_bytes

NUMBERS = (0, 1, 2, 3, 4, 63, 64, 255, 2047, 4096, 65535, 2**31 - 1, -1, -(2**31))
WORDS = (
    *("0", "1", "2", "99", "cpu", "cuda:0", "storage", "module", "", "x", "\n", "\x1b[2J", "é", "__metadata__"),
    *("model.norm.weight", "torch", "collections", "builtins", "os", "FloatStorage", "BFloat16Storage", "HalfStorage"),
    *("LongStorage", "UntypedStorage", "OrderedDict", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    *("system", "eval", "exit", "Size", "Tensor", "_utils", "torch._utils", "torch.storage", "QInt8Storage"),
)
GLOBALS = (
    *("torch\nFloatStorage\n", "torch\nBFloat16Storage\n", "torch\nHalfStorage\n", "torch\nIntStorage\n"),
    *(
        "torch\nDoubleStorage\n",
        "torch\nByteStorage\n",
        "torch.storage\nUntypedStorage\n",
        "collections\nOrderedDict\n",
    ),
    *("torch._utils\n_rebuild_tensor_v2\n", "torch._utils\n_rebuild_tensor\n", "torch._utils\n_rebuild_parameter\n"),
    *("torch\nSize\n", "os\nsystem\n", "builtins\nexec\n", "torch\nbfloat16\n", "torch.nn.parameter\nParameter\n"),
    *("torch._tensor\n_rebuild_from_type_v2\n", "builtins\ndict\n", "builtins\nlist\n", "__main__\nx\n"),
)
SINGLE: tuple[bytes, ...] = (
    b"0",
    b"1",
    b"2",
    b"N",
    b"(",
    b")",
    b"]",
    b"}",
    b".",
    b"\x88",
    b"\x89",
    b"\x85",
    b"\x86",
    b"\x87",
    b"Q",
    b"R",
)
SINGLE += (
    b"b",
    b"t",
    b"u",
    b"s",
    b"e",
    b"a",
    b"\x81",
    b"\x93",
    b"\x94",
    b"K\x01",
    b"J\xff\xff\xff\x7f",
    b"h\x00",
    b"l",
    b"d",
)


def parts_of(data: bytes) -> list[tuple[Any, Any, bytes]]:
    """(opcode, its argument, its bytes) of the first pickle in `data`."""
    found = list(pickletools.genops(data))
    ends = [at for _, _, at in found[1:]] + [(found[-1][2] or 0) + 1]
    return [(code, argument, data[at:end]) for (code, argument, at), end in zip(found, ends, strict=True)]


def damage_pickle(data: bytes, random: Random) -> tuple[bytes, str]:
    """Another pickle, by one or two changes of opcodes; what follows it stays."""
    parts = parts_of(data)
    rest = data[sum(len(raw) for *_, raw in parts) :]
    codes = [raw for *_, raw in parts]
    how = []
    for _ in range(random.choice((1, 1, 1, 2))):
        at = random.randrange(len(codes))
        way = random.choice(("argument",) * 6 + ("drop", "repeat", "swap", "insert", "move", "other"))
        if way == "argument":
            known = [n for n, (code, *_, raw) in enumerate(parts) if n < len(codes) and codes[n] is raw and code.arg]
            if not known:
                continue
            at = random.choice(known)
            codes[at], said = _argument(parts[at], random)
        elif way == "drop":
            said = f"drops {codes[at][:20]!r}"
            codes[at] = b""
        elif way == "repeat":
            codes[at], said = codes[at] * random.choice((2, 2, 3, 1000)), f"repeats {codes[at][:20]!r}"
        elif way == "insert":
            own = random.choice(SINGLE)
            codes[at], said = own + codes[at], f"puts {own!r} before {codes[at][:20]!r}"
        elif way == "other":
            own = random.choice(SINGLE)
            codes[at], said = own, f"has {own!r} for {codes[at][:20]!r}"
        else:
            to = random.randrange(len(codes)) if way == "move" else min(at + 1, len(codes) - 1)
            codes[at], codes[to] = codes[to], codes[at]
            said = f"swaps {codes[at][:20]!r} and {codes[to][:20]!r}"
        how.append(f"op {at} {said}")
    return b"".join(codes) + rest, "; ".join(how)


def _argument(part: tuple[Any, Any, bytes], random: Random) -> tuple[bytes, str]:
    code, value, raw = part
    name = code.name
    if name == "GLOBAL":
        new = random.choice(GLOBALS)
        return b"c" + new.encode(), f"names {new!r} for {value!r}"
    if isinstance(value, str):
        word = random.choice((*WORDS, value + "x", value[:-1], value * 2)).encode()
        return b"X" + struct.pack("<I", len(word)) + word, f"says {word[:40]!r} for {value!r}"[:200]
    if name in ("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"):
        number = random.choice((0, 1, 2, value + 1, max(0, value - 1), random.randrange(80), 2**31))
        return {"G": b"j", "P": b"r"}[name[-3]] + struct.pack("<I", number), f"{name} {number} for {value}"
    if isinstance(value, int) and not isinstance(value, bool):
        number = random.choice((*NUMBERS, value + 1, value - 1, value * 2, 2**40, 2**62, 2**70, -(2**40)))
        size = (number.bit_length() + 8) // 8
        return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True), f"is {number} for {value}"
    return raw[:-1] + bytes([raw[-1] ^ 1]), f"has another bit in {name}"


def damage_torch_file(path: Path, random: Random) -> str:
    """Change the pickle, the archive or the bytes of a file that `torch.save` wrote."""
    data = path.read_bytes()
    if random.random() < 0.1:
        found, how = damage_bytes(data, random)
    elif data[:2] != b"PK":
        found, how = _damage_old(data, random)
    elif random.random() < 0.6:
        found, how = _damage_member(data, random)
    else:
        found, how = _damage_archive(data, random)
    path.write_bytes(found)
    return f"{path.name}: {how}"


def _damage_old(data: bytes, random: Random) -> tuple[bytes, str]:
    """One of the five pickles that stand before the storages, or a storage's length."""
    begins, at = [], 0
    for _ in range(5):
        begins.append(at)
        at += sum(len(raw) for *_, raw in parts_of(data[at:]))
    if random.random() < 0.1:
        number = random.choice((0, 1, 2**31, 2**62, 2**64 - 1))
        return data[:at] + struct.pack("<Q", number) + data[at + 8 :], f"length {number} of the first storage"
    begin = random.choice((*begins[:3], begins[3], begins[3], begins[3], begins[4]))
    found, how = damage_pickle(data[begin:], random)
    return data[:begin] + found, how


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _written(members: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def _damage_member(data: bytes, random: Random) -> tuple[bytes, str]:
    members = _members(data)
    at = next(n for n, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if random.random() < 0.2:
        at = random.randrange(len(members))
    name, content = members[at]
    change: Callable[[bytes, Random], tuple[bytes, str]] = damage_pickle if name.endswith(".pkl") else damage_bytes
    content, how = change(content, random)
    members[at] = name, content
    return _written(members), f"{name}: {how}"


def _damage_archive(data: bytes, random: Random) -> tuple[bytes, str]:
    """Entries that are gone, doubled, renamed, compressed, or that the directory tells wrongly of."""
    members = _members(data)
    at = random.randrange(len(members))
    name, content = members[at]
    way = random.choice(
        ("gone", "double", "renamed", "compressed", "order", "directory", "directory", "local", "end", "joined")
    )
    if way == "gone":
        return _written(members[:at] + members[at + 1 :]), f"{name} is gone"
    if way == "double":
        other = random.choice((content, content[::-1], b""))
        return _written([*members, (name, other)]), f"{name} is there twice"
    if way == "renamed":
        root, _, last = name.partition("/")
        new = random.choice(
            (f"{root}x/{last}", f"{root}/{last}x", last, f"../{name}", name.upper(), f"{root}/data/0", "x\x1b")
        )
        members[at] = new, content
        return _written(members), f"{name} is called {new!r}"
    if way == "compressed":
        return _written(members, random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))), "compressed"
    if way == "order":
        random.shuffle(members)
        return _written(members), "in another order"
    if way == "joined":
        return random.choice((b"", b"x" * 100, b"PK\x03\x04" * 20)) + data + random.choice((b"", b"x", data)), "joined"
    found = bytearray(data)
    marks = {"directory": (b"PK\x01\x02", 46), "local": (b"PK\x03\x04", 30), "end": (b"PK\x05\x06", 22)}
    mark, size = marks[way]
    places = [n for n in range(len(data) - 4) if data[n : n + 4] == mark]
    start = random.choice(places)
    width = random.choice((1, 2, 4))
    field = random.randrange(4, size - width, 2)
    old = int.from_bytes(found[start + field : start + field + width], "little")
    number = random.choice((0, 1, old + 1, old - 1, old * 2, 2**31, 0xFFFFFFFF, random.getrandbits(32))) % (
        1 << 8 * width
    )
    found[start + field : start + field + width] = number.to_bytes(width, "little")
    return bytes(found), f"{way} entry at {start}: {old} is {number} at {field}"
