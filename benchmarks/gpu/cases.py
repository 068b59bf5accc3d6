"""What is run (sizes, variants, the list of cases) and what a case finds: a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fossil_export.verifying._bounds import FACTOR, FLOOR

PARTS = ("layers", "models", "onnx")
DTYPES = ("bfloat16", "float16", "float32")
MODES = ("merged", "tiled", "fused", "swappable")
GRAPHS = {"bat": MODES[:2], "dora": MODES[:1]}
"""The modes of what cannot be a branch."""
GRAPH_LAYERS = ("q, o", "gate, up")
SEED = 20240915
REPEATS = 3
"""Runs whose median is a timing."""


PRODUCTS = ("bat", "lora", "dora")
"""Methods with a matrix product, whose sums another device makes in another order."""


@dataclass(frozen=True)
class Variant:
    """What PEFT is asked to train, and the name of the method that merges it."""

    name: str
    method: str
    rank: int
    options: Mapping[str, Any]
    kind: str = "MissConfig"

    def config(self, **more: Any) -> Any:
        import peft

        return getattr(peft, self.kind)(r=self.rank, **self.options, **more)


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int

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


@dataclass(frozen=True)
class Setup:
    """Sizes of single layers and of the model and graphs, ranks, training, and where."""

    device: str
    layer: Sizes
    model: Sizes
    vocab: int
    rank: int
    ragged: int
    tokens: int
    """Activations of a layer, and tokens of a prompt."""
    steps: int
    rate: float

    @property
    def variants(self) -> dict[str, Variant]:
        return {
            "tile": Variant("tile", "tile", self.rank, {"init_weights": True}),
            "ragged": Variant("ragged", "tile", self.ragged, {"init_weights": True}),
            "mini": Variant("mini", "mini", self.rank, {"init_weights": "mini", "mini_r": self.rank}),
            "bat": Variant("bat", "bat", self.rank, {"init_weights": "bat"}),
            "lora": Variant("lora", "lora", self.ragged, {"lora_alpha": 2 * self.ragged}, "LoraConfig"),
            "dora": Variant("dora", "dora", self.rank, {"lora_alpha": self.rank, "use_dora": True}, "LoraConfig"),
        }

    @property
    def engine_device(self) -> str:
        """The device as it makes fossil-export compute with PyTorch: "cpu" would be NumPy, on both sides."""
        return "cpu:0" if self.device == "cpu" else self.device


LLAMA_8B, LLAMA_3B, TINY = Sizes(4096, 14336, 32, 8), Sizes(3072, 8192, 24, 8), Sizes(128, 192, 4, 2)


def full_setup(device: str, steps: int, rate: float) -> Setup:
    """Layers, which cost no disk, are Llama-3-8B's. The model's are Llama-3.2-3B's, and its vocabulary is short:
    embeddings are only copied, and every merged model is written."""
    return Setup(device, LLAMA_8B, LLAMA_3B, 4096, 64, 50, 64, steps, rate)


def small_setup(device: str, steps: int, rate: float) -> Setup:
    return Setup(device, TINY, TINY, 1000, 16, 10, 16, steps, rate)


@dataclass(frozen=True)
class Case:
    """One row to be; `layer` and `mode` where its part has them."""

    part: str
    dtype: str
    variant: str
    layer: str = ""
    mode: str = ""


def cases(setup: Setup, parts: Sequence[str] = PARTS, dtypes: Sequence[str] = DTYPES) -> list[Case]:
    """All rows, part by part and dtype by dtype; neighbours share what can be shared."""
    return [case for part in parts for dtype in dtypes for case in _cases(setup, part, dtype)]


def _cases(setup: Setup, part: str, dtype: str) -> Iterator[Case]:
    variants = setup.variants.values()
    if part == "models":
        yield from (Case(part, dtype, variant.name) for variant in variants)
    elif part == "layers":
        for variant in variants:
            yield from (Case(part, dtype, variant.name, layer) for layer in setup.layer.layers)
    else:
        for layer in GRAPH_LAYERS:
            for variant in variants:
                modes = GRAPHS.get(variant.method, MODES)
                yield from (Case(part, dtype, variant.name, layer, mode) for mode in modes)


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
    """What one case found. `errors` are pairs (trainer, merged) of relative errors against the truth, judged each
    for itself; `devices` compares the merges made on the CPU and on the device. Both are empty if training
    `diverged` or the case `failed` with an error, which is given."""

    part: str
    variant: str
    rank: int
    dtype: str
    diverged: bool = False
    failed: str = ""
    errors: tuple[tuple[float, float], ...] = ()
    devices: Difference | None = None

    def problems(self) -> list[str]:
        if self.failed:
            return [f"{self.where}: failed: {self.failed}"]
        found = [
            f"{self.where}: the merged error is {merged:.2g}, the trainer's {trainer:.2g}"
            for trainer, merged in self.errors
            if not merged <= FACTOR * trainer + FLOOR
        ]
        if self.variant not in PRODUCTS and self.devices is not None and self.devices.elements:
            found.append(f"{self.where}: CPU and device differ in {self.devices}")
        return found

    @property
    def where(self) -> str:
        return f"{self.part}, {self.variant} r={self.rank}, {self.dtype}"

    @property
    def head(self) -> list[str]:
        return [self.part, f"{self.variant} r={self.rank}", self.dtype]

    @property
    def ending(self) -> str:
        """What the report says in place of figures; empty where there are some."""
        return "FAILED" if self.failed else "diverged" if self.diverged else ""


@dataclass(frozen=True)
class LayerRow(Row):
    """One layer; `peft` compares the device's merge with PEFT's own, made there. Speeds are in bytes of weight a
    second, on one CPU thread and on the device with its transfers; empty where they were not taken."""

    peft: Difference | None = None
    speeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelRow(Row):
    """The model; `errors` are those of the median position and of the worst tenth, `top1` the shares of
    positions with the truth's likeliest token (trainer, merged), `seconds` those of whole merges (CPU, device)."""

    losses: tuple[float, float] = (math.nan, math.nan)
    top1: tuple[float, float] = (math.nan, math.nan)
    nbytes: int = 0
    seconds: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class OnnxRow(Row):
    """One layer in one mode; `swapped_out` says whether the plain graph's answers came back to the bit (None for
    modes without adapters)."""

    mode: str = ""
    swapped_out: bool | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.swapped_out is False:
            found.append(f"{self.where}: the plain graph's answers do not come back")
        return found

    @property
    def where(self) -> str:
        return f"{self.mode} graph, {super().where}"


def blank(setup: Setup, case: Case) -> LayerRow | ModelRow | OnnxRow:
    """The row of a case before anything is found."""
    rank = setup.variants[case.variant].rank
    if case.part == "models":
        return ModelRow("model", case.variant, rank, case.dtype)
    sizes = setup.layer if case.part == "layers" else setup.model
    out, inputs = sizes.layers[case.layer]
    title = f"{case.layer} {out}×{inputs}"
    if case.part == "layers":
        return LayerRow(title, case.variant, rank, case.dtype)
    return OnnxRow(title, case.variant, rank, case.dtype, mode=case.mode)


def row_of(part: str, record: dict[str, Any]) -> Row:
    """The row that `dataclasses.asdict` and JSON made `record` of."""
    kind: type[Row] = {"layers": LayerRow, "models": ModelRow, "onnx": OnnxRow}[part]
    fields = {name: _tuples(value) for name, value in record.items()}
    for name in ("devices", "peft"):
        if fields.get(name) is not None:
            fields[name] = Difference(**fields[name])
    return kind(**fields)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def verdict(rows: Sequence[Row]) -> list[str]:
    """What is wrong, one line for each finding; empty where the merge is the model that was trained."""
    return [problem for row in rows for problem in row.problems()]
