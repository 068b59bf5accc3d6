"""Is the merge, made on a GPU, the model that was trained? Needs a CUDA GPU, no network and no downloaded model.

    python benchmarks/gpu_parity.py --output gpu.md --json gpu.json          # minutes, 25 GB of disk
    python benchmarks/gpu_parity.py --device cpu --small                     # tries the script, in seconds

Single layers and a two-layer model, random, of Llama-3-8B's dimensions, get shards trained through PEFT. The
truth is the trained model, unmerged, in float64; the trainer is the same in the dtype it trained in; the
merged weights come from fossil-export on the CPU (NumPy) and on the device (PyTorch), whose bytes are compared.
"--dtypes" takes a part of the run, "--work" a folder for its models (a RAM disk, if the disk is slow).

Exit code 1, naming the rows, where a merged model is more than twice as far from the truth as its trainer
(plus float32's own noise), or where the two devices' bytes differ for a variant that only adds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import peft
import torch
import transformers
from peft import MissConfig, get_peft_model
from peft.tuners.miss.layer import MissLinear
from threadpoolctl import threadpool_limits

import fossil_export
from fossil_export.checkpoints.dtypes import BY_TORCH_NAME, numpy_dtype
from fossil_export.merging.engine import Engine, NumpyEngine, TorchEngine, is_finite, merge_slab
from fossil_export.verifying.forward import FACTOR, FLOOR, distance

Array = np.ndarray[Any, Any]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float16", "float32")
SEED = 20240915
REPEATS = 3
"""Runs whose median is a timing."""


@dataclass(frozen=True)
class Variant:
    """What PEFT is asked to train, and the name of the method that merges it."""

    name: str
    method: str
    rank: int
    init: bool | str
    mini_r: int = 1

    def config(self, **more: Any) -> Any:
        return MissConfig(r=self.rank, init_weights=self.init, mini_r=self.mini_r, **more)


@dataclass(frozen=True)
class Setup:
    """What is run: sizes of the model, ranks, training, and where."""

    device: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    ragged: int
    tokens: int
    """Activations of a layer, and tokens of a prompt."""
    steps: int
    rate: float

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (
            Variant("tile", "tile", self.rank, True),
            Variant("ragged", "tile", self.ragged, True),
            Variant("mini", "mini", self.rank, "mini", self.rank),
            Variant("bat", "bat", self.rank, "bat"),
        )

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the model's kinds of linear layer."""
        narrow = self.hidden * self.kv_heads // self.heads
        return {
            "q, o": (self.hidden, self.hidden),
            "k, v": (narrow, self.hidden),
            "gate, up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def engine_device(self) -> str:
        """The device as it makes fossil-export compute with PyTorch: "cpu" would be NumPy, on both sides."""
        return "cpu:0" if self.device == "cpu" else self.device


@dataclass(frozen=True)
class Difference:
    """Elements whose bits differ, of how many; the worst in steps between neighbouring numbers of the dtype."""

    elements: int
    total: int
    steps: int

    def __str__(self) -> str:
        if not self.elements:
            return "equal"
        return f"{self.elements} of {self.total} ({self.elements / self.total:.1g}), up to {self.steps} steps"


@dataclass(frozen=True)
class Row:
    """One case. `errors` are pairs (trainer, merged) of relative errors against the truth, judged each for
    itself; `devices` compares the merges made on the CPU and on the device. Both are empty if `diverged`."""

    part: str
    variant: str
    rank: int
    dtype: str
    diverged: bool = False
    errors: tuple[tuple[float, float], ...] = ()
    devices: Difference | None = None

    def problems(self) -> list[str]:
        where = f"{self.part}, {self.variant} r={self.rank}, {self.dtype}"
        found = [
            f"{where}: the merged error is {merged:.2g}, the trainer's {trainer:.2g}"
            for trainer, merged in self.errors
            if not merged <= FACTOR * trainer + FLOOR
        ]
        if self.variant != "bat" and self.devices is not None and self.devices.elements:
            found.append(f"{where}: CPU and device differ in {self.devices}")
        return found

    @property
    def head(self) -> list[str]:
        return [self.part, f"{self.variant} r={self.rank}", self.dtype]


@dataclass(frozen=True)
class LayerRow(Row):
    """One layer; `peft` compares the device's merge with PEFT's own, made there. Speeds are in bytes of weight a
    second, on one CPU thread and on the device with its transfers; None where they were not taken."""

    peft: Difference | None = None
    speeds: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class ModelRow(Row):
    """The model; `errors` are those of the median position and of the worst tenth, `top1` the shares of
    positions with the truth's likeliest token (trainer, merged), `seconds` those of whole merges (CPU, device)."""

    losses: tuple[float, float] = (math.nan, math.nan)
    top1: tuple[float, float] = (math.nan, math.nan)
    nbytes: int = 0
    seconds: tuple[tuple[float, ...], ...] = ()


def verdict(rows: Sequence[Row]) -> list[str]:
    """What is wrong, one line for each finding; empty where the merge is the model that was trained."""
    return [problem for row in rows for problem in row.problems()]


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, which would keep 10 of float32's 23 bits."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def free() -> None:
    """Give the GPU's memory back, which models in reference cycles hold."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def stored(tensor: Any) -> Array:
    """A tensor as the NumPy array in its stored dtype that fossil-export works on."""
    bits = torch.int16 if tensor.element_size() == 2 else torch.int32
    array: Array = tensor.detach().cpu().contiguous().view(bits).numpy()
    return array.view(numpy_dtype(BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]))


def compare(one: Array, other: Array) -> Difference:
    """Two arrays of the same float dtype, bit for bit."""
    bits = np.dtype(f"i{one.dtype.itemsize}")
    a, b = one.view(bits).reshape(-1), other.view(bits).reshape(-1)
    apart = np.flatnonzero(a != b)
    if not len(apart):
        return Difference(0, a.size, 0)
    ordered = []
    for side in (a[apart], b[apart]):
        wide = side.astype(np.int64)
        ordered.append(np.where(wide < 0, -(wide & np.iinfo(bits).max), wide))
    return Difference(len(apart), a.size, int(np.abs(ordered[0] - ordered[1]).max()))


def compare_folders(one: Path, other: Path, dtype: str) -> Difference:
    """The weights files of two models all of whose tensors are of `dtype`; headers must be the same bytes."""
    total = Difference(0, 0, 0)
    kind, chunk = numpy_dtype(BY_TORCH_NAME[dtype]), 1 << 25
    names = sorted(file.name for file in one.glob("*.safetensors"))
    if not names or names != sorted(file.name for file in other.glob("*.safetensors")):
        raise SystemExit(f"{one} and {other} do not hold the same weights files")
    for name in names:
        maps = [np.memmap(folder / name, np.uint8, "r") for folder in (one, other)]
        start = 8 + int(maps[0][:8].view("<u8")[0])
        if maps[0].size != maps[1].size or not np.array_equal(maps[0][:start], maps[1][:start]):
            raise SystemExit(f"{one / name} and {other / name} have different headers")
        data = [part[start:].view(kind) for part in maps]
        for first in range(0, data[0].size, chunk):
            found = compare(data[0][first : first + chunk], data[1][first : first + chunk])
            total = Difference(
                total.elements + found.elements, total.total + found.total, max(total.steps, found.steps)
            )
    return total


def speed_of(engine: Engine, weight: Array, shard: Array, method: str, out: Array) -> float:
    """Bytes of weight a second, median of `REPEATS` merges with all transfers."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        merged_by(engine, weight, shard, method, out)
        seconds.append(time.perf_counter() - started)
    return weight.nbytes / statistics.median(seconds)


def merged_by(engine: Engine, weight: Array, shard: Array, method: str, out: Array) -> None:
    merge_slab(engine, weight, out, engine.widen(shard, "F32"), method, 0, len(weight))


def relative(found: Any, truth: Any) -> float:
    """|found - truth| / |truth|; infinite where it is not a number."""
    value = float((found.double() - truth).norm() / truth.norm())
    return math.inf if math.isnan(value) else value


def trained_layer(setup: Setup, variant: Variant, dtype: str, shape: tuple[int, int]) -> Any:
    """A random linear layer (out, in) in PEFT's wrapper, its shard, in float32 as PEFT keeps it, trained a little."""
    kind = getattr(torch, dtype)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device=setup.device, dtype=kind).requires_grad_(False)
    linear.weight.normal_(std=0.02)
    layer = MissLinear(linear, "default", config=variant.config(), r=variant.rank)
    shard = layer.miss_block["default"]
    shard.data = shard.data.float()
    inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(kind)
    wanted = linear(inputs).float() + torch.randn(setup.tokens, shape[0], device=setup.device)
    optimizer = torch.optim.AdamW([shard], lr=setup.rate)
    for _ in range(setup.steps):
        optimizer.zero_grad()
        # A sum: the mean's gradients would be too small for float16.
        (layer(inputs).float() - wanted).square().sum().backward()
        optimizer.step()
    return layer


def layer_case(setup: Setup, variant: Variant, dtype: str, name: str, speed: bool) -> LayerRow:
    """Train one layer, merge it three times and compare."""
    torch.manual_seed(SEED)
    shape = setup.layers[name]
    layer = trained_layer(setup, variant, dtype, shape)
    weight, shard = stored(layer.base_layer.weight).copy(), stored(layer.miss_block["default"])
    outs, speeds = (np.empty_like(weight), np.empty_like(weight)), []
    with torch.no_grad(), threadpool_limits(1):
        engines: tuple[Engine, ...] = (NumpyEngine(), TorchEngine(setup.engine_device))
        for engine, out in zip(engines, outs, strict=True):
            merged_by(engine, weight, shard, variant.method, out)
            speeds.append(speed_of(engine, weight, shard, variant.method, out) if speed else None)
            engine.close()
    row = LayerRow(f"{name} {shape[0]}×{shape[1]}", variant.name, variant.rank, dtype)
    if not is_finite(shard) or not is_finite(outs[0]):
        return replace(row, diverged=True)
    inputs = torch.randn(setup.tokens, shape[1], device=setup.device).to(getattr(torch, dtype))
    with torch.no_grad():
        truth = copy.deepcopy(layer).double()(inputs.double())
        trainer = relative(layer(inputs), truth)
        ours = torch.from_numpy(outs[1].view(f"i{weight.itemsize}")).view(inputs.dtype).to(setup.device)
        merged = relative(torch.nn.functional.linear(inputs, ours), truth)
        layer.merge()
    theirs = compare(outs[1], stored(layer.base_layer.weight))
    return replace(row, errors=((trainer, merged),), devices=compare(*outs), peft=theirs, speeds=tuple(speeds))


def make_base(setup: Setup, dtype: str, folder: Path) -> None:
    """A random two-layer Llama, saved in `dtype`."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=setup.hidden,
        intermediate_size=setup.inner,
        num_hidden_layers=2,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        vocab_size=setup.vocab,
    )
    with torch.device(setup.device):
        model = transformers.LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def load(folder: Path, dtype: str, device: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)


def train(model: Any, setup: Setup, dtype: str) -> tuple[float, float]:
    """Train the shards on one batch of random tokens; returns the first and the last loss."""
    batch = torch.randint(setup.vocab, (2, setup.tokens), device=setup.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setup.rate)
    # AdamW does not mind the scale of the loss; float16's gradients would vanish without one.
    scale = 1024.0 if dtype == "float16" else 1.0
    losses = []
    for _ in range(setup.steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def logits(model: Any, prompts: Any) -> list[Any]:
    """(positions, vocabulary) of each prompt, in float64 on the CPU."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=prompt[None]).logits[0].double().cpu() for prompt in prompts]


def model_case(setup: Setup, variant: Variant, dtype: str, base: Path, work: Path) -> ModelRow:
    """Train an adapter for the saved base, merge it on both devices and run the result."""
    torch.manual_seed(SEED)
    config = variant.config(target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(load(base, dtype, setup.device), config)
    losses = train(model, setup, dtype)
    row = ModelRow("model", variant.name, variant.rank, dtype, losses=losses)
    finite = all(bool(torch.isfinite(shard).all()) for shard in model.parameters() if shard.requires_grad)
    if not finite or not all(math.isfinite(loss) for loss in losses):
        return replace(row, diverged=True)
    model.save_pretrained(work / "adapter")
    prompts = torch.randint(setup.vocab, (2, setup.tokens), device=setup.device)
    trainer = logits(model, prompts)
    truth = logits(model.double(), prompts)
    del model
    free()
    repeats = REPEATS if dtype == "bfloat16" and variant.name in ("tile", "bat") else 1
    results = [
        [
            fossil_export.merge(
                work / "adapter", work / device.replace(":", "-"), base=base, device=device, overwrite=True
            )
            for _ in range(repeats)
        ]
        for device in ("cpu", setup.engine_device)
    ]
    folders = [runs[0].output for runs in results]
    merged = logits(load(folders[1], dtype, setup.device), prompts)
    theirs, ours = distance(trainer, truth), distance(merged, truth)
    return replace(
        row,
        errors=((theirs.relative_error, ours.relative_error), (theirs.worst_tenth, ours.worst_tenth)),
        devices=compare_folders(folders[0], folders[1], dtype),
        top1=(theirs.top1, ours.top1),
        nbytes=results[0][0].plan.nbytes,
        seconds=tuple(tuple(result.seconds for result in runs) for runs in results),
    )


def run_all(setup: Setup, dtypes: Sequence[str], work: Path | None) -> tuple[list[LayerRow], list[ModelRow]]:
    layers: list[LayerRow] = []
    models: list[ModelRow] = []
    for dtype in dtypes:
        for variant in setup.variants:
            for name in setup.layers:
                layers.append(layer_case(setup, variant, dtype, name, speed=name == "gate, up"))
                free()
            say(f"layers, {variant.name}, {dtype}: done")
        with tempfile.TemporaryDirectory(prefix="gpu-parity-", dir=work) as folder:
            base = Path(folder) / "base"
            make_base(setup, dtype, base)
            for variant in setup.variants:
                free()
                with tempfile.TemporaryDirectory(dir=folder) as case:
                    models.append(model_case(setup, variant, dtype, base, Path(case)))
                say(f"model, {variant.name}, {dtype}: {'diverged' if models[-1].diverged else models[-1].devices}")
    return layers, models


LAYER_COLUMNS = ("layer", "variant", "dtype", "trainer", "merged", "CPU = device", "PEFT = device")
MODEL_COLUMNS = ("variant", "dtype", "loss", "median position", "worst tenth", "top-1", "CPU = device")
SPEED_COLUMNS = ("part", "variant", "dtype", "what", "CPU, GB/s", "device, GB/s")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_cells(row: LayerRow) -> list[str]:
    if row.diverged:
        return [*row.head, "diverged", "", "", ""]
    trainer, merged = row.errors[0]
    return [*row.head, f"{trainer:.2e}", f"{merged:.2e}", str(row.devices), str(row.peft)]


def model_cells(row: ModelRow) -> list[str]:
    loss = f"{row.losses[0]:.3f} → {row.losses[1]:.3f}"
    if row.diverged:
        return [*row.head[1:], loss, "diverged", "", "", ""]
    pairs = [f"{trainer:.2e} / {merged:.2e}" for trainer, merged in row.errors]
    top1 = f"{row.top1[0]:.1%} / {row.top1[1]:.1%}"
    return [*row.head[1:], loss, *pairs, top1, str(row.devices)]


def speed_cells(row: LayerRow | ModelRow) -> list[str]:
    """In GB of weights a second: a byte that is read and written counts once."""
    if isinstance(row, LayerRow):
        speeds, what = [speed or 0.0 for speed in row.speeds], "merge_slab"
    else:
        speeds, what = [row.nbytes / statistics.median(runs) for runs in row.seconds], f"{row.nbytes / 1e9:.2f} GB"
    return [*row.head, what, *(f"{speed / 1e9:.2f}" for speed in speeds)]


def report(
    setup: Setup,
    machine: dict[str, Any],
    layers: Sequence[LayerRow],
    models: Sequence[ModelRow],
    graphs: str,
    others: Sequence[Row] = (),
) -> str:
    """The result as a Markdown document; `graphs` is the table of the ONNX part, or why it was not run."""
    title = ", ".join(f"{name} {value}" for name, value in machine.items())
    taken: list[LayerRow | ModelRow] = [row for row in layers if any(row.speeds)]
    taken += [row for row in models if row.seconds and len(row.seconds[0]) == REPEATS]
    found = verdict([*layers, *models, *others])
    ending = "\n".join(f"- {line}" for line in found) or "Every row is within its bounds."
    return f"""# Merges on the GPU against the CPU and the trained model

{title}.

Shards trained for {setup.steps} AdamW steps at {setup.rate:g}; errors are relative to the unmerged model in float64;
"CPU = device" compares the merged bytes.

## Layers

{table(LAYER_COLUMNS, [*map(layer_cells, layers)])}

## Model: 2 layers, hidden {setup.hidden}, intermediate {setup.inner}, vocabulary {setup.vocab}

Each cell is trainer / merged.

{table(MODEL_COLUMNS, [*map(model_cells, models)])}

## Throughput

Medians of {REPEATS}. merge_slab: one CPU thread; on the device with its transfers. Whole merges (their size is
given) read, write and sync, with threads for every core.

{table(SPEED_COLUMNS, [*map(speed_cells, taken)])}

## ONNX Runtime

{graphs}

## Verdict

{ending}
"""


def publish(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …, or cpu to try the script (default cuda)")
    parser.add_argument("--small", action="store_true", help="tiny dimensions")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: all three")
    parser.add_argument("--steps", type=int, default=10, help="of AdamW (default 10)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    parser.add_argument("--work", type=Path, help="existing folder for temporary models (default: the system's)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the document here, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    for path in (options.output, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist; make it first")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device: str = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        say(
            f"no CUDA GPU that PyTorch {torch.__version__} can use; run on a machine with one, "
            "or try the script with --device cpu --small"
        )
        return 1
    sizes = (128, 192, 4, 2, 1000, 16, 10, 16) if options.small else (4096, 14336, 32, 8, 128256, 64, 50, 64)
    if options.small:
        torch.set_num_threads(1)  # more would wait for each other, at these sizes
    setup = Setup(device, *sizes, steps=options.steps, rate=options.lr)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "PEFT": peft.__version__,
        "transformers": transformers.__version__,
        "fossil-export": fossil_export.__version__,
    }
    started = time.perf_counter()
    with full_float32(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        layers, models = run_all(setup, options.dtypes, options.work)
        import gpu_onnx

        missing = gpu_onnx.why_not(device)
        graphs = [] if missing else gpu_onnx.onnx_rows(setup, options.dtypes, options.work)
    shown = f"Not run: {missing}." if missing else table(gpu_onnx.COLUMNS, [*map(gpu_onnx.cells, graphs)])
    say(f"{time.perf_counter() - started:.0f} s")
    text = report(setup, machine, layers, models, shown, graphs)
    found = verdict([*layers, *models, *graphs])
    print(text)
    if options.output is not None:
        publish(options.output, text)
    if options.json is not None:
        record = {"machine": machine, "setup": asdict(setup), "problems": found}
        rows = {"layers": [asdict(row) for row in layers], "models": [asdict(row) for row in models]}
        rows["onnx"] = [asdict(row) for row in graphs]
        publish(options.json, json.dumps({**record, **rows}, indent=2, ensure_ascii=False) + "\n")
    for line in found:
        say(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
