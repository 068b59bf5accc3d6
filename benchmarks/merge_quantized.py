"""Merges into quantized bases against one into the bfloat16 base of the same shapes: CPU time a byte, in one run.

    python benchmarks/merge_quantized.py --size 3.2 --runs 4

makes the base of merge.py and, with random codes of the same shapes, one in block-scaled fp8 (128 × 128, float32
scales), one in bitsandbytes nf4 (blocks of 64, double quantization) and one in GPTQ (4 bits, groups of 128), all-linear
adapters (tile and LoRA, r = 64), and runs the merges in turn, each as a whole process. All results are bfloat16 (GPTQ's
float16) and have the same size.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import merge
import ml_dtypes
import numpy as np

from fossil_export.checkpoints._header import encode_header

Tensor = tuple[str, str, tuple[int, ...], Callable[[], Any]]
"""Name, dtype, shape, and what makes the values."""

BOUNDS = {"fp8": 1.5, "nf4": 3.0}
"""How many times the CPU time a byte written of the bfloat16 merge is allowed."""


def random_bytes(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(0, 256, count, np.uint8)


def fp8_codes(rng: np.random.Generator, count: int) -> Any:
    """Codes of normally distributed weights, whose largest in a block becomes 448."""
    pool = (rng.standard_normal(1 << 22, np.float32) * 110).clip(-448, 448)
    return np.resize(pool.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), count)


def fp8(rng: np.random.Generator, name: str, rows: int, columns: int) -> Iterator[Tensor]:
    grid = (-(-rows // 128), -(-columns // 128))
    yield name, "F8_E4M3", (rows, columns), lambda: fp8_codes(rng, rows * columns)
    yield f"{name}_scale_inv", "F32", grid, lambda: rng.random(grid, np.float32) * 1e-4


def nf4(rng: np.random.Generator, name: str, rows: int, columns: int) -> Iterator[Tensor]:
    blocks = rows * columns // 64
    nested = -(-blocks // 256)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [rows, columns],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.05,
    }
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    levels = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    levels += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    yield name, "U8", (rows * columns // 2, 1), lambda: random_bytes(rng, rows * columns // 2)
    yield f"{name}.absmax", "U8", (blocks,), lambda: random_bytes(rng, blocks)
    yield f"{name}.quant_map", "F32", (16,), lambda: np.array(levels, np.float32)
    yield f"{name}.nested_absmax", "F32", (nested,), lambda: rng.random(nested, np.float32) * 0.01
    yield f"{name}.nested_quant_map", "F32", (256,), lambda: np.linspace(-1, 1, 256, dtype=np.float32)
    yield f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(packed),), lambda: packed


def gptq(rng: np.random.Generator, name: str, rows: int, columns: int) -> Iterator[Tensor]:
    module, groups = name.removesuffix(".weight"), columns // 128
    order = np.arange(columns, dtype=np.int32) // 128
    yield f"{module}.qweight", "I32", (columns // 8, rows), lambda: random_bytes(rng, columns // 2 * rows)
    yield f"{module}.qzeros", "I32", (groups, rows // 8), lambda: np.full(groups * rows // 8, 0x77777777, np.int32)
    yield f"{module}.scales", "F16", (groups, rows), lambda: (rng.random((groups, rows)) * 1e-3).astype(np.float16)
    yield f"{module}.g_idx", "I32", (columns,), lambda: order


FORMATS: dict[str, tuple[Callable[..., Iterator[Tensor]], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "nf4": (
        nf4,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}),
}


def make_quantized(folder: Path, kind: str, layers: int, plain: Path, vocabulary: int = merge.VOCAB) -> None:
    """The base of merge.py in another format, its linear layers with random codes; nothing if it is there."""
    if (folder / "config.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    make, settings = FORMATS[kind]
    parts: list[list[Tensor]] = [[] for _ in range(4)]
    embedding = (vocabulary, merge.HIDDEN)

    def plain_values(shape: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: (rng.random(shape, np.float32) * 0.02).astype("<f4").view("<u2")[..., 1::2]

    parts[0].append(("model.embed_tokens.weight", "BF16", embedding, plain_values(embedding)))
    for layer in range(layers):
        own = parts[layer * 4 // layers]
        for name, (rows, columns) in merge.LINEARS.items():
            own += make(rng, f"model.layers.{layer}.{name}.weight", rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shape = (merge.HIDDEN,)
            own.append((f"model.layers.{layer}.{name}.weight", "BF16", shape, plain_values(shape)))
    parts[-1].append(("model.norm.weight", "BF16", (merge.HIDDEN,), plain_values((merge.HIDDEN,))))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, *_ in tensors), file)
        with (folder / file).open("wb") as stream:
            stream.write(encode_header([(name, dtype, shape) for name, dtype, shape, _ in tensors], {"format": "pt"}))
            for *_, values in tensors:
                stream.write(np.ascontiguousarray(values()).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=3.2, help="of the bfloat16 base, in GB (default 3.2)")
    parser.add_argument("--runs", type=int, default=4, help="of each merge (default 4)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--work", type=Path, default=common.WORK)
    options = parser.parse_args()
    work: Path = options.work
    bases = {"bfloat16": work / f"base-{options.size:g}"}
    layers = merge.make_base(bases["bfloat16"], options.size)
    for kind in options.formats:
        bases[kind] = work / f"base-{options.size:g}-{kind}"
        make_quantized(bases[kind], kind, layers, bases["bfloat16"])
    targets = [name.rpartition(".")[2] for name in merge.LINEARS]
    adapters = {"tile": work / f"all-{options.size:g}", "LoRA": work / f"lora-{options.size:g}"}
    for name, lora in (("tile", None), ("LoRA", 64)):
        merge.make_adapter(adapters[name], bases["bfloat16"], layers, targets, lora=lora)
    output = work / "output"
    tool = [sys.executable, "-m", "fossil_export", "merge"]
    cases = {f"{kind}, {name}": (kind, name) for kind in bases for name in adapters}
    results: dict[str, list[tuple[float, int, float]]] = {}
    for _, case in common.turns(dict.fromkeys(cases, options.runs)):
        kind, name = cases[case]
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        command = [*tool, str(adapters[name]), "--base", str(bases[kind]), "-o", str(output)]
        results.setdefault(case, []).append(common.spent(command, sync=False))
        wall, peak, cpu = results[case][-1]
        common.say(f"{case}: {wall:.2f} s, {cpu:.2f} CPU-s, {peak / 1e6:.0f} MB")
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    shutil.rmtree(output, ignore_errors=True)
    rows = []
    for case, found in results.items():
        kind, name = cases[case]
        walls, peaks, cpus = zip(*found, strict=True)
        cpu = statistics.median(cpus)
        ratio = cpu / statistics.median(one[2] for one in results[f"bfloat16, {name}"])
        bound = f"{BOUNDS[kind]:g}×" if kind in BOUNDS else ""
        median = f"{statistics.median(walls):.2f}"
        rows.append([kind, name, median, f"{cpu:.2f}", f"{ratio:.2f}×", bound, f"{max(peaks) / 1e6:.0f} MB"])
    print(f"{written / 1e9:.2f} GB written; {common.machine('numpy', 'ml_dtypes')}\n")
    columns = [
        "base",
        "adapter",
        "seconds (median)",
        "CPU-s (median)",
        "CPU against bfloat16",
        "allowed",
        "peak memory",
    ]
    print(common.table(columns, rows))


if __name__ == "__main__":
    main()
