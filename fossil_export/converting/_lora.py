"""To a PEFT LoRA folder, which PEFT, vLLM, SGLang, TGI and LoRAX serve.

Most adapters are LoRAs of the same rank, exactly (see `_form`). One whose update depends on the weight or is of full
rank (bat) is not; it gets the nearest LoRA of a rank, or of the rank that keeps a share of its energy, when the user
asks for that. So does a LoRA that is asked for at a smaller rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._progress import counted
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.converting._form import (
    ENDINGS,
    Part,
    dtype_of,
    matrices,
    most_common,
    parts_of,
    rounded,
    without_form,
)
from fossil_export.converting._lora_card import card
from fossil_export.converting._options import Options
from fossil_export.converting._record import write_record
from fossil_export.converting._tasks import task_of
from fossil_export.converting._widths import Shapes, layer_shapes
from fossil_export.errors import AdapterError, naming

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SERVED = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes (vllm/config/lora.py); SGLang's goes by the largest adapter loaded."""

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Layout:
    """The LoRA as it is written: `rank` is the largest, `scale` the one of all, `factors` are what is multiplied into
    the last matrix of each part, `dtype` is that of all matrices."""

    parts: tuple[Part, ...]
    rank: int
    scale: float
    factors: tuple[float, ...]
    dtype: str


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Fill the folder `output`: adapter_config.json, adapter_model.safetensors, README.md and the record."""
    parts = parts_of(adapter, options)
    asked = options.rank is not None or options.energy is not None
    if (strange := without_form(adapter, parts)) and not asked:
        raise AdapterError(
            f"{adapter.path}: is a {strange} adapter, which is no LoRA; ask for the nearest one with --rank "
            "N or --energy 0.99"
        )
    shapes, known = layer_shapes(adapter, options)
    details: dict[str, Any] = {"exact": not asked}
    cut: Mapping[str, tuple[Array, Array]] = {}
    if asked:
        from fossil_export.converting._nearest import nearest_lora

        _, cut, report = nearest_lora(adapter, parts, shapes, options)
        parts = [replace(part, rank=len(cut[part.name][0]), scale=1.0) if part.name in cut else part for part in parts]
        details |= report
    layout = _layout(adapter, parts, bool(cut))
    error = _write_weights(output / "adapter_model.safetensors", adapter, layout, shapes, cut)
    if error and not asked:
        details |= {"exact": False, "relative_error": float(f"{error:.3g}")}
    base = options.base_id
    config = _config(adapter, layout, known) | {"base_model_name_or_path": base, "revision": options.base_revision}
    (output / "adapter_config.json").write_bytes(write_json(config))
    (output / "README.md").write_text(card(adapter, base, layout.rank, details))
    for name, path in adapter.tokenizer().items():
        with naming(path):
            content = path.read_bytes()
        (output / name).write_bytes(content)
    write_record(output, adapter, options, "lora", {"rank": layout.rank, **details})
    warnings = list(_warnings(adapter, layout, options.base_folder, error if not asked else 0.0, bool(cut)))
    modules = len({part.module for part in parts})
    return {"rank": layout.rank, "modules": modules, **details, "warnings": warnings}


def _layout(adapter: Adapter, parts: Sequence[Part], near: bool) -> _Layout:
    """One scale for all modules, which r and lora_alpha say to loaders that know no patterns (vLLM, SGLang, TGI); a
    module of another one has the rest in its B. The commonest leaves most tensors as they are."""
    scale = 1.0 if near else most_common(part.scale for part in parts if part.kind != "bias")
    if scale == 0:
        scale = 1.0
    factors = tuple(part.scale / scale for part in parts)
    dtype = "F32" if near else dtype_of(adapter, parts, factors)
    return _Layout(tuple(parts), max(part.rank or 0 for part in parts), scale, factors, dtype)


def target_modules(trained: Iterable[str], known: Iterable[str]) -> list[str]:
    """The shortest names that hit exactly the `trained` modules among `known`: last components, else whole names.

    PEFT and vLLM take a module whose name is one of the list or ends with a dot and one of it.
    """
    wanted = set(trained)
    tails = sorted({module.rpartition(".")[2] for module in wanted})
    others = set(known) - wanted
    if known and not any(other == tail or other.endswith(f".{tail}") for other in others for tail in tails):
        return tails
    return sorted(wanted)


def _config(adapter: Adapter, layout: _Layout, known: frozenset[str]) -> dict[str, Any]:
    given, rank = adapter.config, layout.rank
    bias = given.get("bias") or "none"
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        raise AdapterError(f"{adapter.path}: bias is {bias!r}, for which LoRA has no word")
    ranks = {part.module: part.rank or 0 for part in layout.parts if part.kind != "bias"}
    patterns = _pattern(ranks, rank)
    more: dict[str, Any] = {}
    if patterns:
        # PEFT divides by a module's own rank; others by r.
        alphas = {key: _alpha(layout.scale, own) for key, own in patterns.items()}
        more = {"alpha_pattern": alphas, "rank_pattern": patterns}
    if any(part.kind == "bias" for part in layout.parts):
        more["lora_bias"] = True
    config = {
        "auto_mapping": given.get("auto_mapping"),
        "bias": "lora_only" if bias.endswith("_only") else bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _alpha(layout.scale, rank),
        "lora_dropout": 0.0,
        "modules_to_save": given.get("modules_to_save"),
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules(ranks, known),
        "task_type": task_of(adapter),
        "use_dora": False,
        "use_rslora": False,
    }
    return config | more


def _alpha(scale: float, rank: int) -> float | int:
    """The lora_alpha by which a module of this rank is scaled so: alpha / rank gives `scale` again to the bit, if any
    number does."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    found = next((value for value in near if value / rank == scale), alpha)
    return int(found) if found == int(found) else found


def _pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """PEFT's rank_pattern: by the last part of the name if that tells them, else by the whole name."""
    by_tail: dict[str, set[int]] = {}
    for module, own in ranks.items():
        by_tail.setdefault(module.rpartition(".")[2], set()).add(own)
    found: dict[str, int] = {}
    for module, own in ranks.items():
        tail = module.rpartition(".")[2]
        if own != rank:
            found[re.escape(tail if len(by_tail[tail]) == 1 else module)] = own
    return found


def _write_weights(
    path: Path,
    adapter: Adapter,
    layout: _Layout,
    shapes: Shapes,
    cut: Mapping[str, tuple[Array, Array]],
) -> float:
    """The matrices of every module, and what else the adapter holds under the names it has there; one module in memory.
    Returns the largest relative error of a matrix by rounding."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for part in layout.parts:
        sizes = _sizes(adapter, part, shapes[part.name])
        for ending, shape in zip(ENDINGS[part.kind], sizes, strict=True):
            entries.append((f"{_PREFIX}{part.module}.{ending}", layout.dtype, shape))
    entries += [(info.name, info.dtype, info.shape) for info in adapter.saved.values()]
    error = 0.0
    with path.open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        pairs = zip(layout.parts, layout.factors, strict=True)
        for part, factor in counted(pairs, "writing", len(layout.parts), "modules"):
            found = cut.get(part.name) or matrices(adapter, part, *shapes[part.name], factor)
            for matrix in found:
                stored, moved = rounded(adapter, part, matrix, layout.dtype)
                error = max(error, moved)
                file.write(stored.tobytes())
        for info in adapter.saved.values():
            file.write(np.ascontiguousarray(adapter.array(info)).tobytes())
    return error


def _sizes(adapter: Adapter, part: Part, weight: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of what a part becomes."""
    if part.kind == "bias":
        return ((weight[0],),)
    rank, own = part.rank or 0, adapter.trained[part.name].shapes
    if part.own:  # a convolution's have more dimensions
        return (rank, *own["A"][1:]), (own["B"][0], rank, *own["B"][2:])
    outputs, inputs = weight
    return ((rank, outputs), (inputs, rank)) if part.kind == "embedding" else ((rank, inputs), (outputs, rank))


def _warnings(adapter: Adapter, layout: _Layout, folder: str | None, error: float, near: bool) -> Iterator[str]:
    rank = layout.rank
    if rank > SERVED[-1]:
        yield f"rank {rank} is more than the {SERVED[-1]} that vLLM serves; PEFT and SGLang take it"
    elif rank not in SERVED:
        yield f"vLLM serves rank {rank} with --max-lora-rank {next(step for step in SERVED if step > rank)}"
    elif rank > 16:
        yield f"vLLM needs --max-lora-rank {rank} (its default is 16)"
    if error:
        yield f"scales that are no powers of two are in its B, rounded to {layout.dtype} (relative error {error:.1g})"
    plain = not near and not any(adapter.config.get(name) for name in ("use_rslora", "alpha_pattern", "rank_pattern"))
    if plain and all(part.own and factor == 1 for part, factor in zip(layout.parts, layout.factors, strict=True)):
        yield "it was such a LoRA already, and its tensors are as they were"
    if len({part.rank for part in layout.parts if part.kind != "bias"}) > 1:
        yield "its modules have different ranks, which PEFT and vLLM take; other servers may want one"
    if any(part.kind == "bias" for part in layout.parts):
        yield "it changes biases (lora_bias), which PEFT loads and servers do not; merge for those"
    if folder is not None:
        yield f"the base lies in the folder {folder} of its repository; PEFT and servers want it named apart"
    if adapter.saved:
        count = len(adapter.saved)
        yield f"it carries {count} whole trained tensors, which PEFT loads and vLLM refuses; merge for vLLM"
