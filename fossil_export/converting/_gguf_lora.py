"""To a GGUF LoRA adapter, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) load beside a GGUF of the base.

LoRA, tile and mini are LoRAs exactly (see `_form`). Each module becomes `<name>.weight.lora_a` (r, in) and `.lora_b`
(out, r). llama.cpp adds alpha / r · B A x, with the tensor's r and one alpha for all; what a module's scale has beyond
that is multiplied into its B. An embedding's A is stored as (tokens, r). Names, the order of rows and what happens to
tensors that q8_0 does not fit are those of llama.cpp's convert_lora_to_gguf.py and conversion/*.py; keys and shapes, of
src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export.adapters import Adapter
from fossil_export.cards._methods import method_of
from fossil_export.checkpoints._gguf_file import RECORD
from fossil_export.converting._converters import OUTTYPES
from fossil_export.converting._form import (
    Part,
    matrices,
    most_common,
    parts_of,
    refuse_biases,
    relative_error,
    without_form,
)
from fossil_export.converting._gguf_base import HEAD_COUNTS, Base, architecture, base_of, count, interleaved, names_of
from fossil_export.converting._options import Options
from fossil_export.converting._record import record_of
from fossil_export.converting._widths import Shapes, layer_shapes
from fossil_export.errors import AdapterError, FossilExportError, MergeError, listed
from fossil_export.storage import parse_name
from fossil_export.version import __version__

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_LARGEST = {"f32": float(np.finfo(np.float32).max), "f16": 65504.0, "q8_0": 65504.0 * 127}
# q8_0 keeps a float16 scale for 32 values, which is their largest over 127.

_NOTICEABLE = 0.02
# Relative error by rounding; q8_0 of plain values is below 0.01, more means that they are too small for its scales.


@dataclass(frozen=True)
class _Matrices:
    """What is written of one module: llama.cpp's name, and by what its B is multiplied."""

    part: Part
    name: str
    factor: float
    shapes: tuple[tuple[int, int], tuple[int, int]]


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Write `adapter` as one GGUF file. One module is in memory at a time.

    `relative_error` is the largest of the matrices' ‖B' - B‖ / ‖B‖ by rounding to the number format. Raises
    AdapterError for what is no LoRA, MergeError for what llama.cpp has no tensor for, CheckpointError, and OSError.
    """
    parts = _refuse(adapter, options)
    gguf = required("gguf", "gguf", "writing GGUF")
    base = base_of(adapter, options)
    names = names_of(gguf, adapter, parts, base)
    shapes, _ = layer_shapes(adapter, options)
    alpha = _alpha(parts)
    entries = [
        _Matrices(part, names[part.name], _factor(part, alpha), _shapes(part, shapes[part.name])) for part in parts
    ]
    error = _write_file(gguf, output, adapter, options, base, entries, shapes, alpha)
    return {
        "architecture": architecture(gguf, base),
        "outtype": options.outtype,
        "rank": max(part.rank or 0 for part in parts),
        "modules": len(names),
        "exact": error == 0,
        "relative_error": error,
        "warnings": list(_warnings(gguf, entries, options.outtype, error)),
    }


def _alpha(parts: list[Part]) -> float:
    """The alpha of the file: that of most modules. It is a float32, and to llama.cpp 0 means that nothing is scaled."""
    alpha = most_common(part.scale * (part.rank or 0) for part in parts)
    single = float(np.float32(alpha))
    return single if single and math.isfinite(single) else float(max(part.rank or 0 for part in parts))


def _factor(part: Part, alpha: float) -> float:
    """What llama.cpp's alpha / r lacks of a part's scale."""
    found = part.scale * (part.rank or 0) / alpha
    return 1.0 if abs(found - 1) < 1e-15 else found


def _shapes(part: Part, weight: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of lora_a and lora_b; an embedding's weight is (tokens, dims)."""
    (outputs, inputs), rank = weight, part.rank or 0
    return ((outputs, rank), (inputs, rank)) if part.kind == "embedding" else ((rank, inputs), (outputs, rank))


def _refuse(adapter: Adapter, options: Options) -> list[Part]:
    """The parts of an adapter that is a LoRA. Raises for one that llama.cpp has no place for."""
    if options.outtype not in OUTTYPES:
        raise FossilExportError(f"outtype is {options.outtype!r}, expected {', '.join(OUTTYPES)}")
    parts = parts_of(adapter, options)
    if strange := without_form(adapter, parts):
        raise AdapterError(
            f"{adapter.path}: is a {strange} adapter, which is no LoRA; get the nearest one by --to "
            "lora with --rank or --energy, or merge it into the base and convert that"
        )
    refuse_biases(adapter, parts, "a LoRA of llama.cpp")
    if flat := [part.name for part in parts if adapter.trained[part.name].dimensions != 2]:
        raise AdapterError(
            f"{adapter.path}: changes convolutions ({listed(flat)}), which llama.cpp has no LoRA for; merge it into "
            "the base and convert that"
        )
    if adapter.saved:
        own = all(name.removesuffix(".weight") in adapter.trained for name in adapter.saved)
        hint = ", or save the adapter with save_pretrained(..., save_embedding_layers=False) if they are the base's own"
        raise AdapterError(
            f"{adapter.path}: holds whole trained tensors ({listed(sorted(adapter.saved))}), for which a LoRA of "
            f"llama.cpp has no place; merge it into the base and convert that{hint if own else ''}"
        )
    return parts


def _values(
    adapter: Adapter, entry: _Matrices, weight: tuple[int, int], base: Base, outtype: str
) -> tuple[Array, Array]:
    """A and B as llama.cpp has them, not rounded yet: B's rows in its order, the A of an embedding transposed."""
    part = entry.part
    first, second = matrices(adapter, part, *weight, entry.factor)
    largest = max(float(np.abs(first).max()), float(np.abs(second).max()))
    if largest > _LARGEST[outtype]:
        remedy = "use --outtype f32" if outtype != "f32" else "merge it into the base and convert that"
        raise AdapterError(f"{adapter.path}: {part.module} holds {largest:.3g}, more than {outtype} can; {remedy}")
    if part.kind == "embedding":
        return np.ascontiguousarray(first.T), second
    key = HEAD_COUNTS.get(part.module.rpartition(".")[2])
    if base.family.rotary and key is not None:
        heads = count(base, key)
        if len(second) % (2 * heads):
            raise MergeError(
                f"{base.where}: {key} is {heads}, which does not halve the {len(second)} rows of {part.module}; name "
                f"the base that {adapter.path} was trained from with --base"
            )
        second = interleaved(second, heads)
    return first, np.ascontiguousarray(second)


class _Checked(np.ndarray):
    """An array that goes into a file with every failure told: NumPy's own `tofile` has a buffer of C's, and passes over
    a disk that is full when that is closed."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:  # noqa: A002  NumPy's name
        file.write(self.view(np.uint8).data)


def _write_file(
    gguf: Any,
    path: Path,
    adapter: Adapter,
    options: Options,
    base: Base,
    entries: list[_Matrices],
    shapes: Shapes,
    alpha: float,
) -> float:
    """Write all of the file; the largest relative error of a matrix."""
    writer, outtype = gguf.GGUFWriter(path, architecture(gguf, base)), options.outtype
    try:
        _add_keys(gguf, writer, adapter, options, entries, alpha)
        for entry in entries:
            for ending, shape in zip(("lora_a", "lora_b"), entry.shapes, strict=True):
                kind = _kind(gguf, outtype, shape)
                size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
                writer.add_tensor_info(f"{entry.name}.{ending}", shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        error = 0.0
        for entry in entries:
            for matrix in _values(adapter, entry, shapes[entry.part.name], base, outtype):
                kind = _kind(gguf, outtype, matrix.shape)
                stored = gguf.quantize(np.asarray(matrix, np.float32), kind)
                writer.write_tensor_data(np.ascontiguousarray(stored).view(_Checked))
                error = max(error, relative_error(gguf.dequantize(stored, kind), matrix))
        return error
    finally:
        writer.close()


def _add_keys(
    gguf: Any, writer: Any, adapter: Adapter, options: Options, entries: list[_Matrices], alpha: float
) -> None:
    """What llama.cpp's loader asks for, and where the file comes from. The file may go anywhere: of a path of this
    machine it holds the last part."""
    rank = max(entry.part.rank or 0 for entry in entries)
    known = record_of(adapter, options, "gguf-lora", {"rank": rank, "outtype": options.outtype})
    for name in ("adapter", "base"):
        if parse_name(known[name]["name"]) is None:
            known[name] = {**known[name], "name": Path(known[name]["name"]).name}
    base = known["base"]["name"]
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(Path(adapter.name).absolute().name)
    writer.add_description(
        f"{method_of(adapter.peft_type, adapter.variant).name} adapter ({adapter.peft_type}, {adapter.variant}, "
        f"r = {adapter.rank}) in its LoRA form, by fossil-export {__version__}"
    )
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(base).name)
        if (found := parse_name(base)) is not None and found.page is not None:
            writer.add_base_model_repo_url(0, found.page)
    writer.add_string(RECORD, json.dumps(known))
    writer.add_file_type(gguf.LlamaFileType[OUTTYPES[options.outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _warnings(gguf: Any, entries: list[_Matrices], outtype: str, error: float) -> Iterator[str]:
    shapes = [shape for entry in entries for shape in entry.shapes]
    kept = sum(_kind(gguf, outtype, shape) != gguf.GGMLQuantizationType[outtype.upper()] for shape in shapes)
    if kept:
        yield f"{kept} of {len(shapes)} matrices stay f16, for their rows are no multiple of 32 numbers long"
    if error > _NOTICEABLE:
        yield f"{outtype} moved a trained matrix by {error:.1%}; --outtype f32 keeps it"
    if outtype == "f32" and error:
        yield f"scales that are no powers of two are in its B, rounded to f32 (relative error {error:.1g})"


def _kind(gguf: Any, outtype: str, shape: tuple[int, ...]) -> Any:
    """The GGMLQuantizationType of a matrix: `outtype`, or f16 where q8_0's blocks of 32 do not fill its rows."""
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind
