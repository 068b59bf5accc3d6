"""Every refusal: one line that names the file, the tensor and the remedy, exit code 1, nothing written."""

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
from click.testing import CliRunner, Result
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fossil_export.checkpoints.header import encode_header, read_header
from fossil_export.cli import main
from fossil_export.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QPROJ = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *mentions: str) -> None:
    """One line of error that mentions all of `mentions`; no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for mention in mentions:
        assert mention in result.stderr, result.stderr


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = weights(folder)
    change(state)
    save_file(state, folder / WEIGHTS)


def rename(state: dict[str, torch.Tensor], old: str, new: str) -> None:
    state[new] = state.pop(old)


class Code:
    """Runs when unpickled by a careless loader."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/fossil-export-was-run",)


def pickled_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"evil": Code()}, folder / "adapter_model.bin")


def pickled_list(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save([1, 2], folder / "adapter_model.bin")


def cut_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04 cut")


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty folder": (lambda a: [file.unlink() for file in a.iterdir()], [CONFIG, "missing"]),
    "config missing": (lambda a: (a / CONFIG).unlink(), [CONFIG, "missing"]),
    "config not JSON": (lambda a: (a / CONFIG).write_text("{r: 8"), [CONFIG, "not valid JSON"]),
    "config a list": (lambda a: (a / CONFIG).write_text("[]"), [CONFIG, "not a JSON object"]),
    "config unreadable bytes": (lambda a: (a / CONFIG).write_bytes(b"\xff\xfe{"), [CONFIG]),
    "another method": (lambda a: edit_json(a / CONFIG, peft_type="LORA"), [CONFIG, "'LORA'", "MISS or BONE"]),
    "r not a number": (lambda a: edit_json(a / CONFIG, r="8"), [CONFIG, "r is '8'"]),
    "init_weights unknown": (lambda a: edit_json(a / CONFIG, init_weights="odd"), [CONFIG, "'odd'"]),
    "field unknown": (lambda a: edit_json(a / CONFIG, use_dora=True), [CONFIG, "use_dora"]),
    "rank denied": (lambda a: edit_json(a / CONFIG, r=4), [WEIGHTS, QPROJ[-5:], "rank 8", "r=4"]),
    "mini denied": (lambda a: edit_json(a / CONFIG, init_weights="mini", mini_r=5), [WEIGHTS, "mini_r=5"]),
    "bat denied": (lambda a: edit_json(a / CONFIG, init_weights="bat"), [WEIGHTS, "2-dimensional", "'bat'"]),
    "3-D in tile": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(6, 8, 8)})),
        [WEIGHTS, QPROJ, "3-dimensional"],
    ),
    "1-D": (lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8)})), [QPROJ, "1 dimensions"]),
    "empty shard": (lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(0, 48)})), [QPROJ, "ZeRO-3"]),
    "integer shard": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8, 48, dtype=torch.int32)})),
        [QPROJ, "I32"],
    ),
    "target denied": (lambda a: edit_json(a / CONFIG, target_modules=["v_proj"]), [CONFIG, "down_proj"]),
    "target pattern": (lambda a: edit_json(a / CONFIG, target_modules=".*v_proj"), [CONFIG, "down_proj"]),
    "target pattern broken": (lambda a: edit_json(a / CONFIG, target_modules="("), [CONFIG, "regular expression"]),
    "unknown tensor": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.norm.scale": torch.zeros(2)})),
        [WEIGHTS, "model.norm.scale"],
    ),
    "prompt embeddings": (
        lambda a: edit_weights(a, lambda s: s.update({"prompt_embeddings": torch.zeros(2)})),
        [WEIGHTS, "prompt_embeddings"],
    ),
    "saved tensor without a place": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.extra.weight": torch.zeros(2)})),
        ["model.extra.weight", "modules_to_save"],
    ),
    "saved tensor of another shape": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.norm.weight": torch.zeros(2)})),
        ["model.norm.weight", "[2]", "[48]"],
    ),
    "saved twice": (
        lambda a: edit_weights(
            a,
            lambda s: s.update(
                {f"base_model.model.lm_head.{name}": torch.zeros(120, 48) for name in ("weight", "base_layer.weight")}
            ),
        ),
        ["lm_head.weight twice"],
    ),
    "saved tensor empty": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.lm_head.weight": torch.zeros(0)})),
        ["lm_head.weight", "ZeRO-3"],
    ),
    "saved tensor NaN": (
        lambda a: edit_weights(
            a, lambda s: s.update({"base_model.model.lm_head.weight": torch.full((120, 48), float("nan"))})
        ),
        ["lm_head.weight", "NaN", "diverged"],
    ),
    "odd config values": (lambda a: edit_json(a / CONFIG, peft_type=[]), [CONFIG, "peft_type"]),
    "odd modules_to_save": (lambda a: edit_json(a / CONFIG, modules_to_save=True), [CONFIG, "modules_to_save"]),
    "odd base name": (lambda a: edit_json(a / CONFIG, base_model_name_or_path=5), [CONFIG, "base_model_name_or_path"]),
    "huge pattern": (lambda a: edit_json(a / CONFIG, target_modules="a{99999999999999999}"), [CONFIG, "expression"]),
    "no shards": (lambda a: edit_weights(a, lambda s: s.clear()), [WEIGHTS, "no shards"]),
    "another model's shapes": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8, 64)})),
        [QPROJ, "64 outputs", "--base"],
    ),
    "modules the base lacks": (
        lambda a: edit_weights(a, lambda s: rename(s, QPROJ, QPROJ.replace("layers.0", "layers.7"))),
        ["model.layers.7.self_attn.q_proj", "--base"],
    ),
    "a shard for a vector": (
        lambda a: [
            edit_json(a / CONFIG, target_modules=None),
            edit_weights(a, lambda s: rename(s, QPROJ, "base_model.model.model.norm.miss_block")),
        ],
        ["model.norm", "no matrix"],
    ),
    "NaN": (lambda a: edit_weights(a, lambda s: s[QPROJ].fill_(float("nan"))), [QPROJ, "NaN"]),
    "infinity": (lambda a: edit_weights(a, lambda s: s[QPROJ].fill_(float("inf"))), [QPROJ, "infinite"]),
    "cut": (lambda a: os.truncate(a / WEIGHTS, 2000), [WEIGHTS, "cut or corrupt"]),
    "no bytes": (lambda a: (a / WEIGHTS).write_bytes(b""), [WEIGHTS, "too few"]),
    "weights missing": (lambda a: (a / WEIGHTS).unlink(), [str(Path(WEIGHTS))]),
    "pickle with code": (pickled_code, ["adapter_model.bin", "may hold code", "safetensors"]),
    "pickle of a list": (pickled_list, ["adapter_model.bin", "not a state dict"]),
    "pickle cut": (cut_pickle, ["adapter_model.bin"]),
    "base not named": (lambda a: edit_json(a / CONFIG, base_model_name_or_path=None), ["--base"]),
    "base elsewhere": (
        lambda a: edit_json(a / CONFIG, base_model_name_or_path="some/where"),
        ["some/where", "no such file", "--base"],
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapter(name: str, adapter: Path, tmp_path: Path) -> None:
    damage, mentions = BAD_ADAPTERS[name]
    damage(adapter)
    refused(run("merge", adapter, "--output", tmp_path / "merged"), *mentions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert not Path("/tmp/fossil-export-was-run").exists()


def edit_index(base: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first_file(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[0]


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


@pytest.mark.parametrize("where", ["base/out", "adapter/out", "base", "adapter", "."])
def test_output_never_touches_the_inputs(where: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused(run("merge", adapter, "--output", tmp_path / where, "--overwrite"), "--output")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_output_through_a_link_into_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    refused(run("merge", adapter, "--output", tmp_path / "link" / "out"), "lies inside")


def test_existing_output(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    refused(run("merge", adapter, "--output", tmp_path / "full"), "exists already", "--overwrite")
    refused(run("merge", adapter, "--output", tmp_path / "full", "--overwrite"), "not written by fossil-export")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
    refused(run("merge", adapter, "--output", adapter / WEIGHTS), "--output")
    (tmp_path / "file").write_text("")
    refused(run("merge", adapter, "--output", tmp_path / "file"), "not a folder")


def test_one_file_of_several_is_no_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("merge", adapter, "--base", first_file(base), "--output", tmp_path / "merged")
    refused(result, first_file(base).name, "name their folder")


def test_paths_that_cannot_be(adapter: Path, tmp_path: Path) -> None:
    refused(run("merge", "~nobody-of-that-name/x", "--output", tmp_path / "merged"), "no usable path")
    refused(run("merge", "x" * 300, "--output", tmp_path / "merged"), "x" * 300)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(run("merge", adapter, "--output", tmp_path / "loop"), "loop")


def test_device_that_is_not_here(adapter: Path, tmp_path: Path) -> None:
    for device in ("cuda:7", "toaster", "meta"):
        result = run("merge", adapter, "--output", tmp_path / "merged", "--device", device)
        refused(result, device, "--device cpu")
        assert not (tmp_path / "merged").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "merge", tmp_path / "nothing", "--output", tmp_path / "merged")
    *told, last = result.stderr.splitlines()
    assert result.exit_code == 1 and told[0].startswith("Traceback") and "AdapterError" in result.stderr
    assert last.startswith("error: ")


def test_usage_errors_exit_with_2(adapter: Path) -> None:
    assert run("merge", adapter).exit_code == 2
    assert run("merge", adapter, "--dtype", "int8", "--output", "x").exit_code == 2


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
