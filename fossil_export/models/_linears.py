"""Which weights of a model are quantized while transformers loads it, asked of the installed transformers.

These are the weights of its linear layers (`nn.Linear` itself, no class made of it, and for bitsandbytes `Conv1D`), but
for the head, what is tied, and what the class keeps in float32 or the settings name. Source: `replace_with_bnb_linear`
and `replace_with_fp8_linear` in transformers/integrations/bitsandbytes.py and finegrained_fp8.py,
`get_modules_to_not_convert` in transformers/quantizers/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fossil_export.models import _configs
from fossil_export.models._transformers import _quiet, build, model_class, place

_REPLACED = ("Llama4TextExperts",)
# Modules that are made anew, of linear layers, before the weights are quantized.


@dataclass(frozen=True)
class Linears:
    """Parameters with their shapes (as they are quantized); those of `turned` are stored the other way round."""

    shapes: Mapping[str, tuple[int, int]]
    turned: frozenset[str]
    skipped: tuple[str, ...]
    other: str | None = None
    """A module that transformers quantizes to fp8 in a way of its own: experts, or linear layers in groups."""


def linears(config: Mapping[str, Any], class_name: str, skip: Sequence[str] | None) -> Linears | None:
    """Those of class `class_name` for this config.json; `skip` are the modules that the settings name, if they do.

    None if there is no transformers (5 or later), or if it makes no such model, or if it is one whose layers are others
    by the time that they are quantized.
    """
    try:
        with _quiet():
            made = _configs.make(_configs.cleaned(config))
            kind = model_class(class_name)
            model = build(kind, _configs.at(made, place(made, kind)))
            return _found(model, skip)
    except (Exception, RecursionError):  # what foreign code raises for a strange config is not ours to list
        return None


def _found(model: Any, skip: Sequence[str] | None) -> Linears | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = None if skip is None else list(skip)
    kept = HfQuantizer.get_modules_to_not_convert(model, names, model._keep_in_fp32_modules)
    shapes: dict[str, tuple[int, int]] = {}
    turned = set()
    other: str | None = None
    for name, module in model.named_modules():
        if type(module).__name__ in _REPLACED:
            return None
        if name.endswith(".experts") or "GroupedLinear" in type(module).__name__:
            other = other or name
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)) or not should_convert_module(name, kept):
            continue
        weight = f"{name}.weight"
        outputs, inputs = module.weight.shape
        if isinstance(module, Conv1D):
            turned.add(weight)
            outputs, inputs = inputs, outputs
        shapes[weight] = (outputs, inputs)
    return Linears(shapes, frozenset(turned), tuple(sorted(kept)), other)
