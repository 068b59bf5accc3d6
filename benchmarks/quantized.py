"""Which base is the model that was trained, if training ran over quantized weights? (the tables of docs/quantized.md)

    python benchmarks/quantized.py

SmolLM2-135M: all linear layers are quantized (bitsandbytes' nf4 with double quantization and int8; fp8 in blocks of
128 × 128) and read back; PEFT trains adapters over these weights (20 AdamW steps on two sentences). The truth is PEFT's
live model in float32. `fossil-export merge` puts each adapter into the dequantized and into the original
weights, as bfloat16; these, the quantized result and the base are asked three prompts. Then the same with the update
made smaller and larger, and with the update kept apart from a base that a server quantized once more.

q is what the quantization changed, Δ the update: q/Δ = ‖q‖ / ‖Δ‖ over all linear layers.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common
import smollm2
import torch
from safetensors.torch import load_file

from fossil_export import merge

Weights = dict[str, torch.Tensor]
NEUTRAL = "In 1969 two astronauts walked on the surface of the moon. The first words that were said there were heard by"
PROMPTS = (*smollm2.SENTENCES, NEUTRAL)
ADAPTERS = {"FOSSIL r = 64": ("tile", 64, 1e-3), "LoRA r = 16": ("lora", 16, 2e-3)}
"""Variant, rank, learning rate. At 2e-3 the loss of FOSSIL over these weights jumps from 0.07 to 2 in its last step."""
RATIOS = (0.1, 0.3, 1, 3, 10, 30, 100, 150)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4")
    found: torch.Tensor = bnb.dequantize_4bit(codes, state).float()
    return found


def int8(weight: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    found: torch.Tensor = bnb.int8_vectorwise_dequant(codes, scales).bfloat16().float()
    return found


def fp8(weight: torch.Tensor) -> torch.Tensor:
    """e4m3 with a float32 scale for each 128 × 128."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(len(padded) // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) / 448
    found = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
    return found.reshape(padded.shape)[:rows, :columns].bfloat16().float()


def in_blocks(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Symmetric codes with a float16 scale for each 32 of a row: GGUF's Q8_0 and Q4_0, GenAI's int4."""

    def quantizer(weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.reshape(-1, 32)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scales = (largest / (127 if bits == 8 else -8)).half().float()
        codes = (blocks / scales.where(scales != 0, torch.ones(()))).round()
        limits = (-127, 127) if bits == 8 else (-8, 7)
        return (codes.clamp(*limits) * scales).reshape(weight.shape)

    return quantizer


QUANTIZERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"nf4": nf4, "int8": int8, "fp8": fp8}
SERVERS = {"8 bits": in_blocks(8), "4 bits": in_blocks(4)}
"""How a server stores a base that it keeps the update apart from."""


def dequantized(kind: str) -> Path:
    """The real base with its linear layers quantized and read back, as a plain bfloat16 folder in the cache."""

    def make(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(smollm2.base_model(), dtype=torch.bfloat16)
        state = model.state_dict()
        for name in linears(state):
            state[name].copy_(QUANTIZERS[kind](state[name].float()))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(smollm2.base_model()).save_pretrained(folder)

    return smollm2.once(f"smollm2-135m-{kind}", make)


def linears(names: Any) -> list[str]:
    """The weights of the linear layers that are quantized and trained."""
    return [name for name in names if name.endswith("_proj.weight")]


def weights_of(folder: Path) -> Weights:
    found = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    return {name: found[name].float() for name in linears(found)}


def merged(adapter: Path, base: Path, factor: float = 1.0, dtype: str = "auto") -> Weights:
    """What `fossil-export merge` writes for the adapter at this weight."""
    with tempfile.TemporaryDirectory() as folder:
        merge(adapter, Path(folder) / "merged", base=base, weights=[factor], dtype=dtype)
        return weights_of(Path(folder) / "merged")


def norm(weights: Weights) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in weights.values()))


def less(one: Weights, other: Weights) -> Weights:
    return {name: value - other[name] for name, value in one.items()}


def plus(one: Weights, other: Weights) -> Weights:
    return {name: value + other[name] for name, value in one.items()}


def each(weights: Weights, function: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    return {name: function(value) for name, value in weights.items()}


class Asked:
    """The base in float32, whose linear layers are given other weights and which is asked the prompts."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(smollm2.base_model())
        self._model = AutoModelForCausalLM.from_pretrained(smollm2.base_model(), dtype=torch.float32).eval()
        self._tokens = [self._tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]

    def logits(self, weights: Weights) -> list[torch.Tensor]:
        self._model.load_state_dict(weights, strict=False)
        return self._run(self._model)

    def live(self, base: Path, adapter: Path, factor: float = 1.0) -> list[torch.Tensor]:
        """PEFT's unmerged model, its update times a factor."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        for name, value in model.named_parameters():
            if "miss_block" in name or "lora_B" in name:
                value.data *= factor
        return self._run(model.eval())

    def loss(self, logits: list[torch.Tensor]) -> float:
        """Mean cross entropy on the sentences that were trained, in nats a token."""
        pairs = list(zip(logits, self._tokens, strict=True))[: len(smollm2.SENTENCES)]
        parts = [torch.nn.functional.cross_entropy(found[:-1], ids[0, 1:], reduction="none") for found, ids in pairs]
        return float(torch.cat(parts).mean())

    def answers(self, weights: Weights) -> bool:
        """Whether the prompt is continued as it was trained."""
        self._model.load_state_dict(weights, strict=False)
        inputs = self._tokenizer(smollm2.PROMPT, return_tensors="pt")
        ids = self._model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return smollm2.ANSWER in self._tokenizer.decode(ids[0])

    def _run(self, model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(input_ids=ids).logits[0] for ids in self._tokens]


@dataclass(frozen=True)
class Distance:
    """Relative errors of the logits, the least and the largest of the prompts, and the share of positions with the
    same likeliest token."""

    least: float
    most: float
    top1: float

    def __str__(self) -> str:
        return f"{_figure(self.least)}–{_figure(self.most)}"


def distance(found: list[torch.Tensor], truth: list[torch.Tensor]) -> Distance:
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in zip(found, truth, strict=True)])
    return Distance(min(errors), max(errors), float(same.float().mean()))


def left_of(weights: Weights, base: Weights, update: Weights) -> tuple[float, float]:
    """The share of the update that is in `weights`, seen from the base that training saw, and ‖what else is in
    them‖ / ‖Δ‖."""
    moved = less(weights, base)
    inner = sum(float((moved[name].double() * value.double()).sum()) for name, value in update.items())
    return inner / norm(update) ** 2, norm(less(moved, update)) / norm(update)


def _figure(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def candidates(kind: str, base: Path, adapter: Path, factor: float = 1.0) -> Iterator[tuple[str, Weights]]:
    """What the adapter may be merged into, and the base alone."""
    whole = merged(adapter, base, factor)
    yield "dequantized + Δ", whole
    yield "original 16 bit + Δ", merged(adapter, smollm2.base_model(), factor)
    yield f"(dequantized + Δ), {kind} again", each(whole, QUANTIZERS[kind])
    yield f"{kind} base without adapter", weights_of(base)


def apart(base: Weights, original: Weights, update: Weights) -> Iterator[tuple[str, Weights]]:
    """What a server has that quantizes its base once more: the update in float beside it, or merged before."""
    for bits, quantizer in SERVERS.items():
        yield f"dequantized in {bits}, Δ apart", plus(each(base, quantizer), update)
        yield f"(dequantized + Δ) in {bits}", each(plus(base, update), quantizer)
        yield f"original in {bits}, Δ apart", plus(each(original, quantizer), update)


def figures(
    asked: Asked, name: str, weights: Weights, truth: list[torch.Tensor], seen: Weights, update: Weights
) -> Any:
    """A row of a table."""
    logits = asked.logits(weights)
    off, (left, noise) = distance(logits, truth), left_of(weights, seen, update)
    answers = "yes" if asked.answers(weights) else "no"
    return [name, off, f"{off.top1:.0%}", f"{left:.1%}", _figure(noise), f"{asked.loss(logits):.2f}", answers]


COLUMNS = ["", "logits", "top-1", "Δ in it", "other change / Δ", "loss", "answer"]
SWEEP = ["q/Δ", "Δ/W", "loss as trained", "dequantized + Δ", "top-1", "original + Δ", "top-1", "loss"]
SWEEP += ["quantized again", "top-1", "Δ in it"]


def report(asked: Asked, kind: str, name: str, sweep: bool) -> Iterator[str]:
    """The tables of one adapter."""
    base, original = dequantized(kind), weights_of(smollm2.base_model())
    adapter = smollm2.adapter_on(base, *ADAPTERS[name])
    seen = weights_of(base)
    update = less(merged(adapter, base, dtype="float32"), seen)
    truth, size = asked.live(base, adapter), norm(update)
    ratio = norm(less(seen, original)) / size
    yield (
        f"**{kind}, {name}**: ‖Δ‖/‖W‖ {size / norm(seen):.1%}, q/Δ {ratio:.2f}; loss as trained "
        f"{asked.loss(truth):.2f}, of the original without adapter {asked.loss(asked.logits(original)):.2f}\n"
    )
    yield common.header(COLUMNS)
    rows = [*candidates(kind, base, adapter), *(apart(seen, original, update) if sweep else ())]
    for title, weights in rows:
        yield common.row(figures(asked, title, weights, truth, seen, update))
    yield ""
    if not sweep:
        return
    yield common.header(SWEEP)
    for wanted in RATIOS:
        factor = ratio / wanted
        scaled = {key: value * factor for key, value in update.items()}
        truth = asked.live(base, adapter, factor)
        cells = [f"{wanted:g}", f"{norm(scaled) / norm(seen):.2%}", f"{asked.loss(truth):.2f}"]
        for number, (_, weights) in enumerate(candidates(kind, base, adapter, factor)):
            if number == 3:
                break
            logits = asked.logits(weights)
            off = distance(logits, truth)
            cells += [str(off), f"{off.top1:.0%}"]
            cells += [f"{asked.loss(logits):.2f}"] if number == 1 else []
            cells += [f"{left_of(weights, seen, scaled)[0]:.1%}"] if number == 2 else []
        yield common.row(cells)
    yield ""


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--sweep", nargs="*", choices=QUANTIZERS, default=["nf4"], help="kinds with all q/Δ")
    options = parser.parse_args(arguments)
    machine = common.machine("torch", "transformers", "peft", "bitsandbytes")
    print(f"SmolLM2-135M-Instruct, {len(PROMPTS)} prompts, merged as bfloat16, asked in float32; {machine}\n")
    asked = Asked()
    for kind in options.kinds:
        for name in ADAPTERS:
            for line in report(asked, kind, name, kind in options.sweep):
                print(line, flush=True)


if __name__ == "__main__":
    main()
