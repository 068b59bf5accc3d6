"""fp8 with scales, as DeepSeek, Qwen, GLM, MiniMax, Kimi and Mistral publish it, and as transformers saves it.

    W[o, j] = code[o, j] · scale[o // rows, j // columns]      in float32, rounded once to the model's dtype

`X.weight` (out, in) float8 has a scale beside it: `X.weight_scale_inv` (⌈out / rows⌉, ⌈in / columns⌉), or one for the
whole weight if the config has no blocks; DeepSeek-V4 calls it `X.scale`, Mistral `X.qscale_weight`. Experts in one
tensor (n, out, in) have (n, …) of them. Weights that are packed as int8 are e2m1 floats, of which 32 in a row have one
scale. Source: `Fp8Dequantize` and `update_weight_conversions` in transformers' finegrained_fp8.py and
quantizer_finegrained_fp8.py; `weight_dequant` in DeepSeek-V3's inference/kernel.py for blocks that are cut, which
transformers refuses.

fbgemm_fp8: `X.weight_scale` (out, 1), one for each row; of experts in one tensor (n, in, out), one for each column.
Source: `FbgemmFp8Quantize` in transformers/integrations/fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fossil_export._patterns import PatternError, pattern_of
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import BaseFormat, Stored, coded, float_dtype
from fossil_export.checkpoints.quantized._scaled import FP8, SCALES, Scaled

BLOCK = (128, 128)
"""The blocks of a config that names none."""
GROUP = 32
"""Columns that have one scale, of weights of 4 bits."""
SKIPPED = ("modules_to_not_convert", "ignored_layers")
KNOWN = {
    *("quant_method", "activation_scheme", "weight_block_size", "dequantize", "modules_to_convert", "scale_fmt"),
    *("expert_dtype", "fmt", "weight_per_tensor", "act_per_tensor", "activation_scale_ub", "kv_cache_scheme", *SKIPPED),
}


class Fp8(BaseFormat):
    def describes(self, stored: Stored) -> bool:
        if stored.settings is not None:
            return stored.method in ("fp8", "fbgemm_fp8")
        return any(name.endswith("_scale_inv") for name in stored.tensors)

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        settings = stored.settings or {}
        if strange := sorted(set(settings) - KNOWN):
            raise stored.error("quantization_config", f"has the field {strange[0]!r}, which is not known; report it")
        by_rows = stored.method == "fbgemm_fp8"
        block = None if by_rows else _block(stored, settings)
        style = "inverse ue8m0" if settings.get("scale_fmt") == "ue8m0" else "inverse"
        dtype = float_dtype(stored.config)
        skipped = _skipped(stored, settings)
        taken: set[str] = set()
        for name, codes in stored.tensors.items():
            if codes.dtype not in FP8 and (codes.dtype != "I8" or by_rows):
                continue
            scales = _beside(stored, name)
            if scales is None:
                if codes.dtype == "I8":
                    continue  # whole numbers of another use
                raise stored.error(codes, f"has no {name}_scale{'' if by_rows else '_inv'} beside it; fetch it again")
            if len(codes.shape) < 2 or scales.dtype not in SCALES:
                raise stored.error(scales, f"is stored as {scales.dtype}, and is no scale of {list(codes.shape)}")
            if (key := skipped(name.removesuffix(".weight"))) is not None:
                raise stored.error(codes, f"is quantized, but the config says that it is not ({key}); fetch both again")
            taken.add(scales.name)
            # What vLLM reads has one scale for a weight, and says no more of it.
            whole = "weight_block_size" not in settings and element_count(scales.shape) == 1
            own = None if whole else block
            coding = _by_rows(stored, codes, scales, dtype) if by_rows else _scaled(stored, codes, scales, own, dtype)
            if not by_rows and not coding.packed:
                coding = replace(coding, style=style)
            yield coded(name, dtype, (*codes.shape[:-1], coding.width), coding)
        for name, info in stored.tensors.items():
            if name.endswith(("_scale_inv", ".qscale_weight", ".weight_scale")) and name not in taken:
                raise stored.error(
                    info, "is the scale of a weight that is not there as codes, or has another scale; fetch both again"
                )

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        """Scales of activations and caches."""
        return info.name.endswith(
            ("activation_scale", ".input_scale", ".qscale_act", ".input_scale_ub", ".k_scale", ".v_scale")
        )

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """DeepSeek-V4's config tells beside the settings what its experts are stored in."""
        found = super().plain_config(config)
        for part in (found, *(value for value in found.values() if isinstance(value, dict))):
            part.pop("expert_dtype", None)
        return found


def _beside(stored: Stored, name: str) -> TensorInfo | None:
    """The scale of the codes `name`."""
    stem = name.removesuffix("weight")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if stem != name:
        names += [f"{stem}scale", f"{stem}qscale_weight"]
    return next((stored.tensors[one] for one in names if one in stored.tensors), None)


def _block(stored: Stored, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that have one scale; None if a weight has only one."""
    found = settings.get("weight_block_size", BLOCK)
    if found is None:
        return None
    sizes = found if isinstance(found, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(one) is int and one > 0 for one in sizes):
        raise stored.error("weight_block_size", f"is {found!r} in config.json, not two sizes; mend it")
    return sizes[0], sizes[1]


def _scaled(stored: Stored, codes: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None, dtype: str) -> Scaled:
    *lead, outputs, width = codes.shape
    if codes.dtype == "I8":
        columns = 2 * width
        if scales.shape != (*lead, outputs, columns // GROUP) or columns % GROUP:
            wanted = [*lead, outputs, columns // GROUP]
            raise stored.error(
                scales, f"must be {wanted}, one scale for each {GROUP} weights of 4 bits; fetch it again"
            )
        return Scaled(codes, scales, (1, GROUP), dtype, outputs, packed=True, style="powers")
    if block is None:
        if element_count(scales.shape) == 1:
            rows = element_count((*lead, outputs))
            return Scaled(codes, scales, (max(1, rows), max(1, width)), dtype, max(1, rows))
        if lead and scales.shape in ((*lead,), (*lead, 1), (*lead, 1, 1)):
            return Scaled(codes, scales, (outputs, width), dtype, outputs)
        raise stored.error(scales, "must be one number, as the config has no weight_block_size; mend the config")
    wanted_grid = (*lead, -(-outputs // block[0]), -(-width // block[1]))
    if scales.shape != wanted_grid:
        raise stored.error(scales, f"must be {list(wanted_grid)} for blocks of {block[0]} × {block[1]}; fetch it again")
    return Scaled(codes, scales, block, dtype, outputs)


def _by_rows(stored: Stored, codes: TensorInfo, scales: TensorInfo, dtype: str) -> Scaled:
    *lead, outputs, width = codes.shape
    if not lead and scales.shape in ((outputs, 1), (outputs,)):
        return Scaled(codes, scales, (1, width), dtype, outputs)
    if lead and scales.shape in ((*lead, 1, width), (*lead, width, 1)):
        return Scaled(codes, scales, (outputs, 1), dtype, outputs)
    wanted = [*lead, 1, width] if lead else [outputs, 1]
    raise stored.error(scales, f"must be {wanted}, one scale for each output; fetch it again")


_PATTERN = set("\\*+?[](){}|^$")


def _skipped(stored: Stored, settings: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Tells for a module which field of the config says that it is not quantized; None if none does.

    As `should_convert_module` in transformers/quantizers/quantizers_utils.py: an entry is how the name of the module or
    of one around it begins (a pattern, to where a part of the name ends), or how it ends.
    """
    key = next((key for key in SKIPPED if settings.get(key)), "")
    entries = [one for one in stored.names(key) if one]
    plain, ends = {one for one in entries if not _PATTERN & set(one)}, tuple(entries)
    try:
        patterns = [pattern_of(one, "(?:", r")(?:(?<=\.)|(?=\.|$))") for one in entries if one not in plain]
    except PatternError as problem:
        raise stored.error(key, f"has a pattern that {problem}; mend it") from None

    def found(module: str) -> str | None:
        parts = module.split(".")
        if module.endswith(ends):
            return key
        try:
            if any(one.match(module) is not None for one in patterns):
                return key
        except PatternError as problem:
            raise stored.error(key, f"has a pattern that {problem}") from problem
        return key if plain and any(".".join(parts[:n]) in plain for n in range(1, len(parts))) else None

    return found if entries else lambda module: None
