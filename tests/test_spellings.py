"""Dtypes, sizes and devices as they may be written: on the command line, in Python, in config files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import edit_json
from refusal_tools import refused, run

from fossil_export import FossilExportError, convert, merge, plan_merge, plan_onnx
from fossil_export._spellings import chosen, device_named, dtype_named, expected, parse_size
from fossil_export.adapters._quantized import of_settings
from fossil_export.checkpoints.quantized._format import float_dtype
from fossil_export.converting._converters import OUTTYPES
from fossil_export.onnx.builders import PRECISIONS

BFLOAT16: list[Any] = [
    "bf16", "BF16", "bfloat16", " Bfloat16 ", "torch.bfloat16", "ml_dtypes.bfloat16", torch.bfloat16,
    ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16),
]  # fmt: skip
FLOAT32: list[Any] = [
    "f32",
    "fp32",
    "F32",
    "float",
    "torch.float",
    "np.float32",
    torch.float32,
    np.float32,
    np.dtype("f4"),
]
NONE: list[Any] = [
    "",
    "bf61",
    "int8",
    "torch",
    "float8",
    float,
    int,
    None,
    16,
    torch.int8,
    np.int64,
    "torch.torch.bfloat16",
]
SPELLINGS: dict[str | None, list[Any]] = {
    "bfloat16": BFLOAT16,
    "float32": FLOAT32,
    "float16": ["half", torch.half, np.float16],
    "float64": ["double", np.float64],
    None: NONE,
}


@pytest.mark.parametrize(
    ("given", "name"),
    [(one, name) for name, spellings in SPELLINGS.items() for one in spellings],
)
def test_a_dtype_has_one_name_however_it_is_written(given: object, name: str | None) -> None:
    assert dtype_named(given) == name
    assert float_dtype({"torch_dtype": given}, "I8") == {"bfloat16": "BF16", "float32": "F32", "float16": "F16",
                                                         "float64": "F64", None: "I8"}[name]  # fmt: skip
    sign = of_settings({"load_in_4bit": True, "bnb_4bit_compute_dtype": given}, "a test")
    assert sign is not None and sign.compute_dtype == (name if name != "float64" else None)


def test_words_of_each_table_are_found_by_any_spelling_of_theirs() -> None:
    for given, outtype, precision in (
        ("torch.float16", "f16", "fp16"), ("fp32", "f32", "fp32"), (torch.bfloat16, None, "bf16"),
        ("Q8_0", "q8_0", None),
        ("INT4", None, "int4"), ("q4_0", None, None),
    ):  # fmt: skip
        assert (chosen(given, OUTTYPES), chosen(given, PRECISIONS)) == (outtype, precision)
    assert expected(PRECISIONS) == ("expected fp32, fp16, bf16, int4; float16 and torch.float16 mean fp16, and so on")


def test_all_spellings_make_the_same_plan_and_one_name_of_it(adapter: Path) -> None:
    for given in BFLOAT16:
        assert plan_merge(adapter, dtype=given).to_dict()["dtype"] == "bfloat16"
    for given in ("bf16", "torch.bfloat16", "BF16"):
        done = run("merge", adapter, "--dry-run", "--json", "--dtype", given)
        assert json.loads(done.stdout)["dtype"] == "bfloat16", done.output
    shown = run("merge", adapter, "--dry-run", "--dtype", "bf16").stdout
    assert "bfloat16" in shown and "BF16" not in shown
    with pytest.raises(FossilExportError, match=r"dtype is 'bf61', expected auto, .*; bf16 and torch.bfloat16 mean"):
        plan_merge(adapter, dtype="bf61")
    done = run("merge", adapter, "--dry-run", "--dtype", "bf61")
    assert done.exit_code == 2 and "'auto', 'float32', 'float16', 'bfloat16'" in done.stderr


def test_precision_and_outtype_take_all_spellings(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert plan_onnx(adapter, precision="torch.float16").precision == "fp16"  # type: ignore[arg-type]
    for number, given in enumerate(("fp16", torch.float16)):
        convert(adapter, tmp_path / f"{number}.gguf", to="gguf-lora", outtype=given)  # type: ignore[arg-type]
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    with pytest.raises(FossilExportError, match="outtype is 'bf16', expected f32, f16, q8_0"):
        convert(adapter, tmp_path / "x.gguf", to="gguf-lora", outtype="bf16")  # type: ignore[arg-type]


def test_a_compute_dtype_that_is_none_is_refused_and_not_left_out(adapter: Path) -> None:
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bf61"}
    with pytest.raises(
        FossilExportError, match="bnb_4bit_compute_dtype is 'bf61', expected float32, float16, bfloat16"
    ):
        plan_merge(adapter, trained_on=how)


def test_spellings_import_nothing_heavy() -> None:
    script = (
        "import sys; from fossil_export._spellings import *\n"
        "assert dtype_named('bf16') == 'bfloat16' and parse_size('5GB') and device_named('gpu')\n"
        "assert not {'torch', 'numpy', 'ml_dtypes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("given", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), ("5GiB", 5 << 30), ("5Gi", 5 << 30),
     ("500 MB", 5 * 10**8), ("0.5TB", 5 * 10**11), ("1.5kib", 1536), ("7B", 7), (7, 7),
     (5e9, 5 * 10**9), (np.int64(7), 7)],
)  # fmt: skip
def test_sizes_are_bytes(given: Any, size: int) -> None:
    assert parse_size(given) == size and type(parse_size(given)) is int


NO_SIZES = ["5", "5.5", "1e9", "5 bytes", "GB", "-1GB", "0GB", "0.1B", "५GB", "", 0, -5, 1.5, True, None, 10**400]


@pytest.mark.parametrize("given", [*NO_SIZES, float("nan"), float("inf")])
def test_a_size_without_a_unit_is_refused_and_so_is_what_is_none(given: Any) -> None:
    with pytest.raises(FossilExportError, match=r"max_shard_size is .*5GB"):
        parse_size(given)


def test_a_size_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(FossilExportError, match="expected a size like 5GB"):
        parse_size("9" * 5000 + "GB")


def test_the_command_says_which_units_there_are(adapter: Path, tmp_path: Path) -> None:
    for option, more in (("--max-shard-size", []), ("--max-disk", ["--push-to-hub", "a/b", "--stream"])):
        done = run("merge", adapter, "--dry-run", *more, option, "5")
        line = (
            f"error: Invalid value for '{option}': '5' is no size: expected a size like 5GB or 500MiB; units are B, KB"
        )
        assert done.exit_code == 2 and done.stderr.startswith(line)
    assert len(plan_merge(adapter, max_shard_size=20_000).files) > 1


def test_gpu_is_cuda_and_other_devices_are_refused_in_one_way(adapter: Path, tmp_path: Path) -> None:
    for given, device in (("gpu", "cuda"), ("GPU:1", "cuda:1"), (torch.device("cuda", 1), "cuda:1"), ("CPU", "cpu")):
        assert device_named(given) == device
    out = tmp_path / "merged"
    if not torch.cuda.is_available():
        refused(
            run("merge", adapter, "-o", out, "--device", "gpu"), "device 'cuda' is not available here (", "--device cpu"
        )
    for given in ("mps", "xpu", "cuda:x", torch.device("meta")):
        with pytest.raises(FossilExportError, match=f"^device is '{given}', expected cpu, cuda or cuda:N"):
            merge(adapter, out, device=given)  # type: ignore[arg-type]
    merge(adapter, out, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert out.is_dir()


def test_a_dtype_in_the_bases_config_may_be_written_in_any_way(base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", torch_dtype="torch.bfloat16")
    assert plan_merge(adapter, dtype="float").to_dict()["config_edits"]
