"""Small bases of whole numbers of a few bits: codes drawn at random, packed by their definition, one bit at a time, and
what PyTorch computes of them in the dtype of the scales, as GPTQModel and AutoAWQ do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quantized_bases import linears, plain_model, write
from safetensors.torch import load_file, save_file

AWQ_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""The place in its word of each of eight outputs."""


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n, m) packed along the first axis, bit after bit: (⌈n · bits / 32⌉, m) int32."""
    count = len(codes)
    codes = torch.nn.functional.pad(codes.long(), (0, 0, 0, -len(codes) % 32))
    words = torch.zeros(len(codes) // 32 * bits, codes.shape[1], dtype=torch.int64)
    for bit in range(32 * bits):  # of each 32 codes
        words[bit // 32 :: bits] |= (codes[bit // bits :: 32] >> bit % bits & 1) << bit % 32
    return (words - ((words >> 31) << 32)).int()[: -(-count * bits // 32)]


@dataclass
class Case:
    """One quantized weight (out, in): what it is (`value`), and its tensors."""

    value: torch.Tensor
    tensors: dict[str, torch.Tensor]


def _drawn(
    shape: tuple[int, int], bits: int, group: int, dtype: str, sym: bool, tiny: bool
) -> tuple[torch.Tensor, ...]:
    """With `tiny`, some values are no normal numbers of float16."""
    outputs, inputs = shape
    groups = -(-inputs // group)
    codes = torch.randint(0, 1 << bits, (inputs, outputs))
    zeros = torch.full((groups, outputs), 1 << bits - 1) if sym else torch.randint(1, 1 << bits, (groups, outputs))
    scales = torch.rand(groups, outputs) * (1e-4 if tiny else 0.2 / (1 << bits)) + (1e-6 if tiny else 1e-4)
    return codes, zeros, scales.to(getattr(torch, dtype))


def gptq(
    shape: tuple[int, int],
    bits: int = 4,
    group: int = 64,
    *,
    dtype: str = "float16",
    sym: bool = False,
    act: bool = False,
    less_one: bool = True,
    tiny: bool = False,
    order: bool = True,
) -> Case:
    """As `dequantize_weight` of GPTQModel's TorchLinear has it."""
    size = shape[1] if group == -1 else group
    codes, zeros, scales = _drawn(shape, bits, size, dtype, sym, tiny)
    of_input = torch.arange(shape[1]) // size
    if act:
        of_input = of_input[torch.randperm(shape[1])]
    value = scales[of_input] * (codes - zeros[of_input]).to(torch.int16)
    tensors = {
        "qweight": packed(codes, bits),
        "qzeros": packed((zeros - int(less_one)).T, bits).T.contiguous(),
        "scales": scales,
    }
    if order:
        tensors["g_idx"] = of_input.int()
    return Case(value.T.contiguous(), tensors)


def awq(shape: tuple[int, int], group: int = 64, *, dtype: str = "float16", tiny: bool = False) -> Case:
    """As `dequantize_gemm` of AutoAWQ has it."""
    size = shape[1] if group == -1 else group
    codes, zeros, scales = _drawn(shape, 4, size, dtype, False, tiny)
    of_input = torch.arange(shape[1]) // size
    value = (codes - zeros[of_input]).to(torch.int8) * scales[of_input]

    def words(of: torch.Tensor) -> torch.Tensor:
        placed = torch.zeros(of.shape[0], of.shape[1] // 8, dtype=torch.int64)
        for output, place in AWQ_PLACES.items():
            placed |= of[:, output::8].long() << 4 * place
        return (placed - ((placed >> 31) << 32)).int()

    return Case(value.T.contiguous(), {"qweight": words(codes), "qzeros": words(zeros), "scales": scales})


@dataclass
class Folders:
    quantized: Path
    dequantized: Path
    settings: dict[str, Any] = field(default_factory=dict)


def folder_of(work: Path, make: Any, settings: dict[str, Any], biases: bool = False) -> Folders:
    """A model whose linear layers are `make((out, in), name)` each, and the same with the weights that these are."""
    torch.manual_seed(3)
    base = plain_model(work / "plain", "float16")
    tensors = load_file(base / "model.safetensors")
    quantized, truth = dict(tensors), dict(tensors)
    for name in linears(tensors):
        one = make(tuple(tensors[name].shape), name)
        truth[name] = one.value
        del quantized[name]
        module = name.removesuffix(".weight")
        quantized |= {f"{module}.{part}": value.contiguous() for part, value in one.tensors.items()}
    dequantized = work / "dequantized"
    dequantized.mkdir()
    save_file(truth, dequantized / "model.safetensors", {"format": "pt"})
    (dequantized / "config.json").write_bytes((base / "config.json").read_bytes())
    return Folders(write(work / "quantized", base, quantized, settings), dequantized, settings)


def with_settings(folder: Path, settings: dict[str, Any] | None, beside: dict[str, Any] | None = None) -> Path:
    """The folder with other settings in its config.json, or none, and those `beside` it in quantize_config.json."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "quantize_config.json").write_text(json.dumps(beside))
    return folder
