"""To a GGUF LoRA adapter, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) load beside a GGUF of the base.

Tile and mini are LoRAs exactly (see `_form`). Each module becomes `<name>.weight.lora_a` (r, in) and `.lora_b` (out,
r); llama.cpp adds alpha / r · B A x, so alpha is r. Names, the order of rows and what happens to tensors that q8_0
does not fit are those of llama.cpp's convert_lora_to_gguf.py and conversion/*.py; the keys, of src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._gguf_file import RECORD
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.converting._converters import OUTTYPES
from fossil_export.converting._form import exact_lora, lora_rank
from fossil_export.converting._options import Options
from fossil_export.converting._record import record_of
from fossil_export.converting._widths import Shapes, layer_shapes
from fossil_export.errors import AdapterError, CheckpointError, FossilExportError, MergeError, listed
from fossil_export.merging._guess import declared_tie, is_head
from fossil_export.storage import parse_name, resolve
from fossil_export.version import __version__

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_LARGEST = {"f32": float("inf"), "f16": 65504.0, "q8_0": 65504.0 * 127}
# q8_0 keeps a float16 scale for 32 values, which is their largest over 127.

_NOTICEABLE = 0.02
# Relative error by rounding; q8_0 of plain values is below 0.01, more means that they are too small for its scales.


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a kind of models: `arch` in gguf's MODEL_ARCH, `rotary` if it reorders the rows of q and k
    (`interleaved`), `tied` if transformers ties head and embedding where the config does not say."""

    arch: str
    rotary: bool = False
    tied: bool = False


FAMILIES = {
    "llama": Family("LLAMA", rotary=True),
    "mistral": Family("LLAMA", rotary=True),
    "smollm3": Family("SMOLLM3", rotary=True, tied=True),
    "granite": Family("GRANITE", rotary=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA", tied=True),
    "gemma2": Family("GEMMA2", tied=True),
    "gemma3": Family("GEMMA3", tied=True),
    "gemma3_text": Family("GEMMA3", tied=True),
    "phi3": Family("PHI3"),
}
"""By `model_type`. SmolLM and SmolLM2 are llama; Phi-4 is phi3. Source: the classes in llama.cpp's conversion/*.py."""

_HEAD_COUNTS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_TO_LAYERS = re.compile(r"(?:(?:model\.)?language_model\.(?:model\.)?|model\.text_model\.|model\.)?(?=layers\.\d)")


@dataclass(frozen=True)
class _Base:
    """The base as its config tells it; `where` the config was found, `text` its part on the language model."""

    where: Path
    text: Mapping[str, Any]
    family: Family
    tied: bool


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Write `adapter` as one GGUF file. One module is in memory at a time.

    `relative_error` is the largest of the modules' ‖B' - B‖ / ‖B‖ by rounding to the number format. Raises AdapterError
    for what is no LoRA, MergeError for what llama.cpp has no tensor for, CheckpointError, and OSError.
    """
    _refuse(adapter, options)
    gguf = required("gguf", "gguf", "writing GGUF")
    base = _base(adapter, options)
    names = _names(gguf, adapter, base)
    shapes, _ = layer_shapes(adapter, options)
    parts = _parts(adapter, shapes, base, options.outtype)
    error = _write_file(gguf, output, adapter, options, base, names, shapes, parts)
    return {
        "architecture": _architecture(gguf, base),
        "outtype": options.outtype,
        "rank": adapter.rank,
        "modules": len(names),
        "exact": error == 0,
        "relative_error": error,
        "warnings": list(_warnings(gguf, adapter, shapes, options.outtype, error)),
    }


def interleaved(rows: Array, heads: int) -> Array:
    """`rows` (out, r) of q or k in llama.cpp's order: transformers rotates row i of a head with row i + d/2, llama.cpp
    row 2i with row 2i + 1. Source: LlamaModel.permute in llama.cpp's conversion/llama.py."""
    outputs, rank = rows.shape
    return rows.reshape(heads, 2, outputs // heads // 2, rank).swapaxes(1, 2).reshape(outputs, rank)


def _refuse(adapter: Adapter, options: Options) -> None:
    if options.outtype not in OUTTYPES:
        raise FossilExportError(f"outtype is {options.outtype!r}, expected {', '.join(OUTTYPES)}")
    if lora_rank(adapter) is None:
        raise AdapterError(
            f"{adapter.path}: is a {adapter.variant} adapter, which is no LoRA; get the nearest one by --to "
            "lora with --rank or --energy, or merge it into the base and convert that"
        )
    if adapter.saved:
        own = all(name.removesuffix(".weight") in adapter.trained for name in adapter.saved)
        hint = ", or save the adapter with save_pretrained(..., save_embedding_layers=False) if they are the base's own"
        raise AdapterError(
            f"{adapter.path}: holds whole trained tensors ({listed(sorted(adapter.saved))}), for which a LoRA of "
            f"llama.cpp has no place; merge it into the base and convert that{hint if own else ''}"
        )


def _base(adapter: Adapter, options: Options) -> _Base:
    config: Mapping[str, Any] | None
    if options.base_config is not None:
        where = resolve(options.base_config, CheckpointError, "base config")
        where = where / "config.json" if where.is_dir() else where
        config = read_json(where, CheckpointError)
    else:
        assert options.base is not None
        checkpoint = options.base.checkpoint()
        where, config = checkpoint.location, checkpoint.config
        if config is None:
            raise CheckpointError(
                f"{where}: has no config.json, which tells the family of the model; name its folder with --base"
            )
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    kind = text.get("model_type") or config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, and llama.cpp's names are known for {', '.join(FAMILIES)}; merge the "
            "adapter into the base and convert that"
        )
    family = FAMILIES[kind]
    tie = declared_tie(config)
    return _Base(where, text, family, family.tied if tie is None else tie)


def _names(gguf: Any, adapter: Adapter, base: _Base) -> dict[str, str]:
    """llama.cpp's name of each module's weight. Raises MergeError where there is none."""
    heads = [module for module in adapter.trained if is_head(module)]
    if heads and base.tied:
        raise MergeError(
            f"{base.where}: ties {heads[0]} to the embedding, so llama.cpp has no head to add to; merge the adapter "
            "into the base, which parts them, and convert that"
        )
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[base.family.arch], _count(base, "num_hidden_layers"))
    found: dict[str, str] = {}
    for module in adapter.trained:
        plain = module.rpartition(".")[2] if is_head(module) else _TO_LAYERS.sub("model.", module, count=1)
        name = known.get_name(plain) if plain.startswith("model.layers.") or is_head(plain) else None
        if name is not None:
            found[module] = f"{name}.weight"
    missing = [module for module in adapter.trained if module not in found]
    if missing:
        raise MergeError(
            f"{adapter.path}: llama.cpp's {_architecture(gguf, base)} has no tensor for {listed(missing)}; merge the "
            "adapter into the base and convert that"
        )
    return found


def _parts(adapter: Adapter, shapes: Shapes, base: _Base, outtype: str) -> Iterator[tuple[str, Array, Array]]:
    """Module, A and B in the shard's dtype, B's rows in llama.cpp's order."""
    for module, first, second in exact_lora(adapter, shapes):
        if (largest := float(np.abs(second).max())) > _LARGEST[outtype]:
            raise AdapterError(
                f"{adapter.path}: {module} holds {largest:.3g}, more than {outtype} can; use --outtype f32"
            )
        key = _HEAD_COUNTS.get(module.rpartition(".")[2])
        if base.family.rotary and key is not None:
            heads = _count(base, key)
            if len(second) % (2 * heads):
                raise MergeError(
                    f"{base.where}: {key} is {heads}, which does not halve the {len(second)} rows of {module}; name "
                    f"the base that {adapter.path} was trained from with --base"
                )
            second = interleaved(second, heads)
        yield module, first, second


def _count(base: _Base, key: str) -> int:
    """A positive number of the config. Where it does not tell the heads of the keys, they are as many as queries'."""
    value = base.text.get(key)
    if value is None and key == "num_key_value_heads":
        return _count(base, "num_attention_heads")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{base.where}: {key} is {value!r}, expected a positive integer; name the base's folder with --base"
        )
    return value


def _write_file(
    gguf: Any,
    path: Path,
    adapter: Adapter,
    options: Options,
    base: _Base,
    names: Mapping[str, str],
    shapes: Shapes,
    parts: Iterator[tuple[str, Array, Array]],
) -> float:
    """Write all of the file; the largest relative error of a B."""
    writer, outtype = gguf.GGUFWriter(path, _architecture(gguf, base)), options.outtype
    try:
        _add_keys(gguf, writer, adapter, options)
        for module, name in names.items():
            outputs, inputs = shapes[module]
            for ending, shape in (("lora_a", (adapter.rank, inputs)), ("lora_b", (outputs, adapter.rank))):
                kind = _kind(gguf, outtype, shape)
                size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
                writer.add_tensor_info(f"{name}.{ending}", shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        error = 0.0
        for _, first, second in parts:
            for matrix in (first, second):
                kind = _kind(gguf, outtype, matrix.shape)
                stored = gguf.quantize(matrix, kind)
                writer.write_tensor_data(stored)
            error = max(error, _relative_error(gguf.dequantize(stored, kind), second))
        return error
    finally:
        writer.close()


def _add_keys(gguf: Any, writer: Any, adapter: Adapter, options: Options) -> None:
    """What llama.cpp's loader asks for, and where the file comes from. The file may go anywhere: of a path of this
    machine it holds the last part."""
    known = record_of(adapter, options, "gguf-lora", {"rank": adapter.rank, "outtype": options.outtype})
    for name in ("adapter", "base"):
        if parse_name(known[name]["name"]) is None:
            known[name] = {**known[name], "name": Path(known[name]["name"]).name}
    base = known["base"]["name"]
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(Path(adapter.name).absolute().name)
    writer.add_description(
        f"FOSSIL adapter ({adapter.peft_type}, {adapter.variant}, r = {adapter.rank}) in its LoRA form, "
        f"by fossil-export {__version__}"
    )
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(base).name)
        if (found := parse_name(base)) is not None and found.page is not None:
            writer.add_base_model_repo_url(0, found.page)
    writer.add_string(RECORD, json.dumps(known))
    writer.add_file_type(gguf.LlamaFileType[OUTTYPES[options.outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _warnings(gguf: Any, adapter: Adapter, shapes: Shapes, outtype: str, error: float) -> Iterator[str]:
    matrices = [shape for out, width in shapes.values() for shape in ((adapter.rank, width), (out, adapter.rank))]
    kept = sum(_kind(gguf, outtype, shape) != gguf.GGMLQuantizationType[outtype.upper()] for shape in matrices)
    if kept:
        yield f"{kept} of {len(matrices)} matrices stay f16, for their rows are no multiple of 32 numbers long"
    if error > _NOTICEABLE:
        yield f"{outtype} moved a trained matrix by {error:.1%}; --outtype f32 keeps it"


def _architecture(gguf: Any, base: _Base) -> str:
    name: str = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[base.family.arch]]
    return name


def _kind(gguf: Any, outtype: str, shape: tuple[int, ...]) -> Any:
    """The GGMLQuantizationType of a matrix: `outtype`, or f16 where q8_0's blocks of 32 do not fill its rows."""
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind


def _relative_error(found: Array, wanted: Array) -> float:
    exact = np.asarray(wanted, np.float64)
    norm = float(np.square(exact).sum())  # np.linalg.norm would start threads for each of many small matrices
    return math.sqrt(float(np.square(found - exact).sum()) / norm) if norm else 0.0
