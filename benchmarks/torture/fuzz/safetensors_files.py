"""Damage to safetensors files, as one who knows the format."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_bytes, damage_tree

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
_NAMES = (
    "\x1b[2Jx",
    "\u202ex",
    "x" * 5000,
    "",
    "__metadata__ ",
    "../../x",
    "é",
    "a.b.c.weight",
    "\ud800",
    "\n",
    "\x9b",
)


def damage_safetensors(path: Path, random: Random) -> str:
    content = path.read_bytes()
    way = random.choice(("bytes", "length", "tree", "tree", "text", "tensor", "tensor", "tensor", "order", "values"))
    if way == "bytes":
        found, how = damage_bytes(content, random)
    elif way == "length":
        length = int.from_bytes(content[:8], "little")
        odd = random.choice((0, 1, length - 1, length + 1, len(content) - 8, len(content), 2**60, 2**64 - 1, 10**8 + 1))
        found, how = odd.to_bytes(8, "little") + content[8:], f"header length {odd}"
    else:
        found, how = _with_header(content, way, random)
    path.write_bytes(found)
    return f"{path.name}: {how}"


def _with_header(content: bytes, way: str, random: Random) -> tuple[bytes, str]:
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    if way == "tree":
        changed, how = damage_tree(header, random)
        return _file(json.dumps(changed).encode("utf-8", "surrogatepass"), data), how
    if way == "text":
        return _text(json.dumps(header), name, data, random)
    if way == "order":
        other = header[random.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        return _file(json.dumps(header).encode(), data), f"{name} has the bytes of another"
    if way == "values":
        first, last = entry["data_offsets"]
        odd = random.choice((b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"))
        at = random.randrange(first, max(first + 1, last - 3), 4) if last - first >= 4 else first
        return _file(json.dumps(header).encode(), data[:at] + odd + data[at + 4 :]), f"{name} has {odd.hex()} at {at}"
    parts = [(one, header[one]["dtype"], header[one]["shape"], _part(data, header[one])) for one in names]
    metadata = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    changed, how = _tensors(parts, names.index(name), random)
    return _made(metadata, changed), how


def _tensors(parts: list[Any], at: int, random: Random) -> tuple[list[Any], str]:
    """A file that is sound by itself, and holds other tensors."""
    name, dtype, shape, data = parts[at]
    way = random.choice(
        ("gone", "renamed", "shape", "dtype", "added", "cut", "long", "twice", "empty", "swapped", "none")
    )
    if way == "gone":
        return parts[:at] + parts[at + 1 :], f"{name} is gone"
    if way == "renamed":
        other = random.choice((*_NAMES, name.replace("layers.0", "layers.1"), name + ".0", name[17:], name.upper()))
        if random.random() < 0.1:
            other = name.replace("layers.0", f"layers.{'9' * 5000}")
        parts[at] = (other, dtype, shape, data)
        return parts, f"{name} is called {other!r}"[:200]
    if way == "shape":
        count = len(data) // _SIZES[dtype]
        other = random.choice(([count], [1, *shape], [*shape, 1], shape[::-1], [1] * 70 + shape, [2, count // 2]))
        parts[at] = (name, dtype, other, data)
        return parts, f"{name} has the shape {other}"[:200]
    if way == "dtype":
        other = random.choice(list(_SIZES))
        count = len(data) // _SIZES[dtype]
        parts[at] = (name, other, shape, (data * 3)[: count * _SIZES[other]])
        return parts, f"{name} is {other}"
    if way == "added":
        new = random.choice((*_NAMES, name + "_", "base_model.model.model.layers.9.mlp.up_proj.weight", "qweight"))
        if random.random() < 0.4:
            new = name.rpartition(".")[0] + random.choice((".qweight", ".bias", ".weight_scale", ".scales", ".qzeros"))
        parts.append((new, dtype, shape, data))
        return parts, f"{new!r} is added"[:200]
    if way in ("cut", "long") and shape and len(data):
        rows = shape[0] + (1 if way == "long" else -1)
        size = len(data) // shape[0]
        parts[at] = (name, dtype, [rows, *shape[1:]], (data + data)[: rows * size])
        return parts, f"{name} has {rows} rows"
    if way == "twice":
        parts.append((name + random.choice((" ", ".weight", ".modules_to_save.weight")), dtype, shape, data))
        return parts, f"{name} is there under another name too"
    if way == "empty":
        parts[at] = (name, dtype, [0, *shape[1:]], b"")
        return parts, f"{name} is empty"
    if way == "swapped":
        other = random.randrange(len(parts))
        one, two = parts[at], parts[other]
        parts[at], parts[other] = (two[0], *one[1:]), (one[0], *two[1:])
        return parts, f"{one[0]} and {two[0]} are swapped"
    return [], "no tensors"


def _text(text: str, name: str, data: bytes, random: Random) -> tuple[bytes, str]:
    way = random.choice(("twice", "spaces", "before", "bom", "utf-16", "zeros", "deep", "number", "metadata"))
    if way == "twice":
        return _file(
            (text[:-1] + f", {json.dumps(name)}: {json.dumps(json.loads(text)[name])}}}").encode(), data
        ), "twice"
    if way == "metadata":
        return _file((text[:-1] + ', "__metadata__": {"a": "b"}}').encode(), data), "metadata twice"
    encoded = {
        "spaces": text.encode() + b" " * random.randrange(9),
        "before": b" " + text.encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "utf-16": text.encode("utf-16"),
        "zeros": text.encode() + b"\0" * 8,
        "deep": text[:-1].encode() + b', "d": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "number": text.replace('"data_offsets": [', '"data_offsets": [' + "0" * random.randrange(2), 1).encode(),
    }[way]
    return _file(encoded, data), f"header: {way}"


def _part(data: bytes, entry: Any) -> bytes:
    first, last = entry["data_offsets"]
    return data[first:last]


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _made(metadata: Any, parts: list[Any]) -> bytes:
    header: dict[str, Any] = dict(metadata)
    end = 0
    for name, dtype, shape, data in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return _file(text, b"".join(part[3] for part in parts))
