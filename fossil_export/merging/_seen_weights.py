"""The weights of a base as training saw them: those that it quantized, as the installed transformers tells.

Which these are `models._linears` says. A weight is quantized as it is run, which need not be as it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fossil_export._extras import install, need, require
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._coding import Coding
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized import coded
from fossil_export.checkpoints.quantized._trained_on import QUANTIZERS, OfConv1d, TrainedOn
from fossil_export.errors import MergeError
from fossil_export.merging._naming import Naming, naming_of
from fossil_export.models import Unknown, pieces_of
from fossil_export.models._linears import Linears, linears

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
# A module of one expert, which transformers had until its version 5 made them parameters of three dimensions.


def with_tensors(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
    """The base with these in the place of its own of the same names."""
    files = tuple(
        replace(header, tensors=tuple(tensors.get(info.name, info) for info in header.tensors)) for header in base.files
    )
    return replace(base, files=files, tensors={info.name: info for header in files for info in header.tensors})


def as_trained(
    adapter: Adapter, base: Checkpoint, how: TrainedOn, skip_modules: Sequence[str] | None = None
) -> dict[str, TensorInfo]:
    """The weights of `base` that training quantized, as it saw them, by their stored names. Raises MergeError."""
    naming = naming_of(adapter, base)
    found, parameters = _quantized(naming, base, skip_modules)
    if how.kind == "fp8" and found.other:
        raise MergeError(
            f"{base.location}: {found.other} is quantized to fp8 in another way than linear layers are, which is not "
            "done here; choose --into original"
        )
    if how.kind == "fp8":  # which leaves Conv1D as it is
        parameters = {one: shape for one, shape in parameters.items() if one not in found.turned}
    names = naming.names
    stored: dict[str, TensorInfo] = {}
    turned: set[str] = set()
    for parameter, shape in parameters.items():
        if parameter in names.whole:
            info = base.tensors[names.whole[parameter]]
            if parameter in found.turned:
                turned.add(info.name)
            if info.shape != (shape[::-1] if parameter in found.turned else shape) or info.dtype not in FLOATS:
                raise MergeError(_cannot(base, info, f"is {list(shape)} in the model that was trained"))
            stored[info.name] = info
    for made in {id(made): made for one in parameters if (made := names.converted.get(one)) is not None}.values():
        infos = [base.tensors[name] for group in made.stored.values() for name in group]
        if not all(one in parameters for one in made.parameters):
            raise MergeError(_cannot(base, infos[0], "is quantized in parts"))
        try:
            for one in made.parameters:
                pieces_of(made, one, {info.name: info.shape for info in infos}, base.config or {}, naming.model.shapes)
        except Unknown as problem:
            raise MergeError(_cannot(base, infos[0], f"is stored in another way than it is run ({problem})")) from None
        width = infos[0].shape[-1]
        if how.kind == "fp8":
            raise MergeError(
                _cannot(base, infos[0], f"is a part of {made.parameters[0]}, whose blocks go over its parts")
            )
        if how.kind != "int8" and (how.double_quant or width % how.block_size or len(infos[0].shape) < 2):
            why = "scales were quantized for all of its parts" if how.double_quant else "blocks do not end with rows"
            raise MergeError(_cannot(base, infos[0], f"is a part of {made.parameters[0]}, whose {why}"))
        stored |= {info.name: info for info in infos}
    if any(_EXPERT.search(module) for module in adapter.trained):
        kept = [f"{module}." for module in skip_modules or ()]
        found_there = [info for info in experts(adapter, base) if not any(module in info.name for module in kept)]
        stored |= {info.name: info for info in found_there}
    if not stored:
        raise MergeError(
            f"{base.location}: has no weights that the installed transformers quantizes while {naming.model.name} is "
            "loaded; choose --into original"
        )
    return {name: seen_weight(info, how, name in turned) for name, info in stored.items()}


def experts(adapter: Adapter, base: Checkpoint) -> list[TensorInfo]:
    """Linear layers of single experts in the base's files that are parameters of three dimensions at work.

    bitsandbytes leaves these as they are. In a training with transformers 4 they were modules, and quantized.
    """
    names = naming_of(adapter, base).names
    found = []
    for made in {id(made): made for made in names.converted.values()}.values():
        if any(operation.name == "MergeModulelist" for operation in made.operations):
            found += [base.tensors[name] for group in made.stored.values() for name in group]
    return [info for info in found if len(info.shape) == 2 and info.dtype in FLOATS]


def seen_weight(info: TensorInfo, how: TrainedOn, turned: bool = False) -> TensorInfo:
    """A weight as training saw it; `turned` if it is stored the other way round."""
    coding: Coding = OfConv1d(info, how) if turned else QUANTIZERS[how.kind](info, how)
    return coded(info.name, how.compute_dtype, info.shape, coding)


def _quantized(
    naming: Naming, base: Checkpoint, skip: Sequence[str] | None
) -> tuple[Linears, dict[str, tuple[int, int]]]:
    """The parameters, as the base's class calls them, that training quantized, with their shapes."""
    model = naming.inner or naming.model
    config = base.config or {}
    if naming.inner is not None:
        config = config.get("text_config") or config
    found = linears(config, model.name, skip) if naming.known else None
    if found is None:
        what = f"{base.location}: telling which of its weights were quantized in training"
        require(what, need("peft", "torch", "transformers"))
        newer = install(["peft"], ["'transformers>=5'"])
        raise MergeError(
            f"{base.location}: which of its weights were quantized in training cannot be told without transformers 5 "
            f"that knows {model.name or 'its class'}: {newer}; or say --into original"
        )
    return found, {known: shape for name, shape in found.shapes.items() if (known := naming.parameter(name))}


def _cannot(base: Checkpoint, info: TensorInfo, what: str) -> str:
    return (
        f"{base.location}: {info.name} {list(info.shape)} {what}, so that it cannot be quantized as training did; "
        "choose --into original, or save the base as training saw it, dequantized, and merge into that"
    )
