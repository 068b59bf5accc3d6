"""Damage to the tree of an ONNX file, which protobuf keeps."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_file

NUMBERS = (0, 1, -1, 2, 3, 7, 16, 17, 255, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    *("", " ", "x", "y0", "../x", "/etc/passwd", ".", "..", "\x1b[2J", "a\nb", "é" * 300, "x" * 100_000, "é/.."),
    *("ai.onnx", "com.microsoft", "fossil_export", "-1", "0", "99999999999999999999", "1e3", "{}", "[]", "null"),
)


def damage_graph(path: Path, random: Random) -> str:
    """One place of the model in `path`, or of how its parts hang together; now and then a byte."""
    import onnx

    if random.random() < 0.1:
        return damage_file(path, random)
    if random.random() < 0.02:
        return deep(path, random)
    model = onnx.load(path, load_external_data=False)
    way = random.choice(
        (_field, _field, _field, _field, _text_of_another, _cycle, _subgraph, _external, _shape, _twice)
    )
    how = way(model, random)
    path.write_bytes(model.SerializePartialToString())
    return f"{path.name}: {how}"[:300]


def places(message: Any, path: str = "") -> list[tuple[Any, Any, int | None, str]]:
    """Each (message, field, index in a repeated one, path) that is set."""
    found: list[tuple[Any, Any, int | None, str]] = []
    for field, value in message.ListFields():
        name = f"{path}.{field.name}"
        repeated = not isinstance(value, (str, bytes, int, float)) and not hasattr(value, "ListFields")
        for index, one in enumerate(value) if repeated else [(None, value)]:
            found.append((message, field, index, name))
            if hasattr(one, "ListFields"):
                found += places(one, f"{name}[{index}]" if repeated else name)
            elif index is not None and index > 8:  # the values of a tensor
                break
    return found


def _field(model: Any, random: Random) -> str:
    message, field, index, name = random.choice(places(model))
    values = getattr(message, field.name)
    if random.random() < 0.2:
        if index is None:
            message.ClearField(field.name)
        else:
            del values[index]
        return f"{name} is gone"
    if field.cpp_type == field.CPPTYPE_MESSAGE:
        if index is not None:
            values.add().CopyFrom(values[index])
            return f"{name}[{index}] comes again"
        values.Clear()
        return f"{name} is empty"
    old = values if index is None else values[index]
    new = _other(old, field, random)
    if index is None:
        setattr(message, field.name, new)
    else:
        values[index] = new
    return f"{name} is {new!r}"


def _other(old: Any, field: Any, random: Random) -> Any:
    if isinstance(old, str):
        return random.choice((*TEXTS, f"{old}x", old[:-1]))
    if isinstance(old, bytes):
        return random.choice(
            (b"", old[:-1], old + b"\0", old * 2, random.randbytes(len(old)), *(t.encode() for t in TEXTS))
        )
    if isinstance(old, float):
        return random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.enum_type is not None:
        return random.choice([one.number for one in field.enum_type.values] + [99])
    small = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32)
    fitting = [number for number in (*NUMBERS, old + 1, old - 1) if not small or -(2**31) <= number < 2**31]
    return random.choice([number for number in fitting if field.cpp_type != field.CPPTYPE_UINT64 or number >= 0])


def _text_of_another(model: Any, random: Random) -> str:
    """A name or text is another one that stands in the graph."""
    found = [
        one for one in places(model) if one[1].cpp_type == one[1].CPPTYPE_STRING and one[1].type == one[1].TYPE_STRING
    ]
    texts = [getattr(m, f.name) if i is None else getattr(m, f.name)[i] for m, f, i, _ in found]
    message, field, index, name = random.choice(found)
    new = random.choice(texts)
    if index is None:
        setattr(message, field.name, new)
    else:
        getattr(message, field.name)[index] = new
    return f"{name} is {new!r}"


def _cycle(model: Any, random: Random) -> str:
    first, last = sorted(random.sample(range(len(model.graph.node)), 2))
    if not model.graph.node[first].input or not model.graph.node[last].output:
        return _field(model, random)
    at = random.randrange(len(model.graph.node[first].input))
    model.graph.node[first].input[at] = model.graph.node[last].output[0]
    return f"node {first} reads what node {last} makes"


def _subgraph(model: Any, random: Random) -> str:
    """An If in an If in an If; the innermost branch is the whole graph, or empty."""
    import onnx

    depth = random.choice((1, 2, 10, 30))
    inner = onnx.GraphProto()
    if random.random() < 0.5:
        inner.CopyFrom(model.graph)
    for _ in range(depth):
        outer = onnx.GraphProto(name="outer")
        node = outer.node.add(op_type="If", name="if", input=["condition"], output=["z"])
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
        inner = outer
    model.graph.node.extend(inner.node)
    return f"{depth} graphs within each other"


def deep(path: Path, random: Random) -> str:
    """The same, deeper than protobuf's classes write it."""
    depth, inner = random.choice((40, 300, 5000, 50_000)), b""
    for number in range(depth):
        inner = _within(7 if number == depth - 1 else 6, _within(1, _within(4, b"If") + _within(5, inner)))
    path.write_bytes(path.read_bytes() + inner)  # protobuf reads what follows as more of the same
    return f"{path.name}: {depth} graphs within each other"


def _within(number: int, content: bytes) -> bytes:
    """A field of bytes or a message."""
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def _external(model: Any, random: Random) -> str:
    """How a tensor names its bytes beside the graph."""
    tensors = [one for one in model.graph.initializer if one.external_data]
    if not tensors:
        return _field(model, random)
    tensor = random.choice(tensors)
    entry = random.choice(tensor.external_data)
    entry.value = random.choice((*TEXTS, *map(str, NUMBERS), "model.onnx", "./model.onnx.data", "model.onnx.data/"))
    if random.random() < 0.2:
        tensor.data_location = onnx_default(tensor)
    return f"{tensor.name}: {entry.key} is {entry.value!r}"


def onnx_default(tensor: Any) -> int:
    return int(tensor.DEFAULT)


def _shape(model: Any, random: Random) -> str:
    """Another shape or type of an initializer."""
    tensor = random.choice(model.graph.initializer)
    dims = list(tensor.dims)
    new = random.choice(
        (
            dims[::-1],
            [],
            [0, *dims],
            [1, *dims],
            dims * 40,
            [-1, *dims[1:]],
            [dims[0] + 1, *dims[1:]],
            [2**40, 2**40],
            [-2, -12],
        )
    )
    del tensor.dims[:]
    tensor.dims.extend(new)
    if random.random() < 0.3:
        tensor.data_type = random.choice(list(range(30)))
    return f"{tensor.name}: dims {new}, type {tensor.data_type}"


def _twice(model: Any, random: Random) -> str:
    """Two things of one name."""
    kind = random.choice((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output))
    if len(kind) < 2:
        kind.add().CopyFrom(kind[0])
        return "the same twice"
    one, other = random.sample(range(len(kind)), 2)
    if hasattr(kind[one], "output") and kind[one].output and kind[other].output:
        kind[one].output[0] = kind[other].output[0]
    kind[one].name = kind[other].name
    return f"{one} has the name of {other}"
