"""Bases that cannot be merged into: one line that names the file, the tensor and the remedy, nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal_tools import CONFIG, first_file, refused, run
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from fossil_export import plan_merge
from fossil_export.checkpoints._dtypes import BITS
from fossil_export.checkpoints._header import encode_header, read_header
from fossil_export.errors import CheckpointError


def edit_index(base: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def shift(header: dict[str, Any], by: int) -> None:
    name = [key for key in header if key != "__metadata__"][-1]
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


def quantize(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        from safetensors.torch import load_file

        save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)


def poison(base: Path) -> None:
    from safetensors.torch import load_file

    for path in base.glob("*.safetensors"):
        state = load_file(path)
        for name in state:
            if name.endswith("layers.1.mlp.up_proj.weight"):
                state[name][3, 3] = float("nan")
        save_file(state, path)


def reshape(base: Path, wanted: str) -> None:
    from safetensors.torch import load_file

    for path in base.glob("*.safetensors"):
        state = load_file(path)
        for name in state:
            if name.endswith(wanted):
                state[name] = state[name][..., :-1].clone()
        save_file(state, path)


BAD_BASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "index names a missing file": (lambda b: first_file(b).unlink(), ["index.json", "missing"]),
    "index leads outside": (
        lambda b: edit_index(b, lambda m: m.update({"lm_head.weight": "../secret.safetensors"})),
        ["index.json", "../secret.safetensors"],
    ),
    "index absolute": (
        lambda b: edit_index(b, lambda m: m.update({"lm_head.weight": "/etc/passwd"})),
        ["index.json", "/etc/passwd"],
    ),
    "index names a tensor its file lacks": (
        lambda b: edit_index(b, lambda m: m.update({"ghost.weight": first_file(b).name})),
        ["index.json", "ghost.weight"],
    ),
    "index without map": (
        lambda b: (b / "model.safetensors.index.json").write_text("{}"),
        ["index.json", "weight_map"],
    ),
    "index empty": (lambda b: edit_index(b, lambda m: m.clear()), ["index.json", "empty"]),
    "index forgets a tensor": (
        lambda b: edit_index(b, lambda m: m.pop("model.norm.weight")),
        ["index.json", "model.norm.weight"],
    ),
    "index gone": (lambda b: (b / "model.safetensors.index.json").unlink(), ["index"]),
    "header length": (
        lambda b: first_file(b).write_bytes(struct.pack("<Q", 1 << 60) + first_file(b).read_bytes()[8:]),
        ["header claims"],
    ),
    "header not JSON": (
        lambda b: first_file(b).write_bytes(struct.pack("<Q", 8) + b"not json"),
        ["not valid JSON"],
    ),
    "overlap": (lambda b: rewrite_header(first_file(b), lambda h: shift(h, -16)), ["overlaps"]),
    "gap": (lambda b: rewrite_header(first_file(b), lambda h: shift(h, 16)), ["gap"]),
    "file too long": (
        lambda b: first_file(b).write_bytes(first_file(b).read_bytes() + b"\0" * 8),
        ["tensors end"],
    ),
    "file too short": (
        lambda b: os.truncate(first_file(b), first_file(b).stat().st_size - 8),
        ["tensors end", "cut"],
    ),
    "quantized": (quantize, ["down_proj.weight", "I8", "quantized"]),
    "NaN in the base": (poison, ["model.layers.1.mlp.up_proj.weight", "NaN", "base is damaged"]),
    "config not JSON": (lambda b: (b / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config with odd values": (
        lambda b: edit_json(b / "config.json", architectures=5),
        ["config.json", "architectures"],
    ),
    "config is a folder": (
        lambda b: [(b / "config.json").unlink(), (b / "config.json").mkdir()],
        ["config.json: is a broken link or no regular file"],
    ),
    "more layers than there are": (lambda b: edit_json(b / "config.json", num_hidden_layers=3), ["2 layers", "is 3,"]),
    "absurdly many layers": (lambda b: edit_json(b / "config.json", num_hidden_layers=2**31), ["is 2,147,483,648"]),
    "a norm of another width": (lambda b: reshape(b, "model.norm.weight"), ["model.norm.weight has shape [47]"]),
    "a layer of another width": (
        lambda b: reshape(b, "layers.1.mlp.up_proj.weight"),
        ["layers.1.mlp.up_proj.weight has shape"],
    ),
    "index metadata": (
        lambda b: edit_json(b / "model.safetensors.index.json", metadata="x"),
        ["index.json", "metadata"],
    ),
    "broken link": (lambda b: (b / "vocab.txt").symlink_to(b / "gone"), ["vocab.txt", "broken link"]),
    "only pickles": (
        lambda b: [path.rename(path.with_suffix(".bin")) for path in b.glob("model*")],
        ["only as", "save_pretrained"],
    ),
    "an adapter": (
        lambda b: [[path.unlink() for path in b.glob("model*")], (b / CONFIG).write_text("{}")],
        ["is an adapter", "--base"],
    ),
    "nothing": (lambda b: [path.unlink() for path in b.iterdir()], ["no safetensors weights"]),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_bad_base(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    damage, mentions = BAD_BASES[name]
    damage(base)
    refused(run("merge", adapter, "--output", tmp_path / "merged"), str(base), *mentions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)

    def large(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.gate_proj" in name and parameter.requires_grad:
                parameter.data += 70_000.0

    make_adapter(tmp_path / "adapter", base, change=large)
    result = run("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    refused(result, "model.layers.1.mlp.gate_proj.weight", "overflows float16", "--dtype bfloat16")
    assert not (tmp_path / "merged").exists()
    assert run("merge", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "float32").exit_code == 0


def test_cast_overflow_names_the_tensor(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    for path in base.glob("*.safetensors"):
        state = weights(base)
        mine = {name: state[name] for name in (tensor.name for tensor in read_header(path).tensors)}
        if "model.norm.weight" in mine:
            mine["model.norm.weight"] = mine["model.norm.weight"] * 1e6
        save_file(mine, path, {"format": "pt"})
    result = run("merge", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "float16")
    refused(result, "model.norm.weight", "overflows float16")


def test_one_file_of_several_is_no_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("merge", adapter, "--base", first_file(base), "--output", tmp_path / "merged")
    refused(result, first_file(base).name, "name their folder")


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A sound safetensors file, then perhaps damaged somewhere."""
    dtypes = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F64": 8}
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    entries = [
        (name, draw(st.sampled_from(list(dtypes))), tuple(draw(st.lists(st.integers(0, 3), max_size=3))))
        for name in names
    ]
    entries = [entry for entry in entries if entry[0] != "__metadata__"]
    total = sum(int(np.prod(shape)) * dtypes[dtype] for _, dtype, shape in entries)
    content = bytearray(encode_header(entries, draw(st.sampled_from([{}, {"format": "pt"}]))) + bytes(total))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=300, deadline=None)
@given(headers())
def test_headers_are_judged_as_safetensors_judges_them(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Nothing but CheckpointError is ever raised, and never is a file taken that the library refuses."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "np") as opened:
            theirs = set(opened.keys())
    except SafetensorError:
        theirs = None
    try:
        ours = {tensor.name for tensor in read_header(path).tensors}
    except CheckpointError as problem:
        assert "\n" not in str(problem).replace(str(path), "") or theirs is None
        return
    assert ours == theirs


@pytest.mark.parametrize("dtype", BITS)
def test_a_dtype_is_as_wide_as_safetensors_has_it(dtype: str, tmp_path: Path) -> None:
    for nbytes in range(70):
        header = {"t": {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}}
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(nbytes)
        try:
            deserialize(content)
        except SafetensorError as problem:
            assert "unknown variant" not in str(problem) and nbytes != BITS[dtype]
        else:
            assert nbytes == BITS[dtype]


@pytest.mark.parametrize("named", ["other.safetensors", "model.safetensors.index.json"])
def test_a_config_that_names_its_weights_is_refused(named: str, base: Path, adapter: Path) -> None:
    """transformers would load these; a merge into other files, or of another layout, would be another model."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    with pytest.raises(CheckpointError, match=r"transformers_weights names '.*take the field out"):
        plan_merge(adapter)
