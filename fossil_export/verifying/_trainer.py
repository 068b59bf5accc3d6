"""The model as it was trained, unmerged: the base with its adapters beside it, run by PEFT where PEFT can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fossil_export._foreign import load_model
from fossil_export.adapters import Adapter
from fossil_export.adapters._fields import OTHERS
from fossil_export.adapters._files import WEIGHTS
from fossil_export.errors import FossilExportError
from fossil_export.methods import METHODS, starts_elsewhere
from fossil_export.verifying._models import TorchRunner, class_and_config, quiet, resize
from fossil_export.verifying._peft_folder import TRAINING, peft_folder
from fossil_export.verifying._sum import Sum


def open_trainer(
    added: Sum,
    base: Path,
    artifact: Path,
    dtype: str,
    device: str,
    change: Callable[[Any], None] | None = None,
    merged: bool = False,
) -> TorchRunner:
    """`base` in `dtype` with the adapters unmerged beside it, what was trained in float32, each at its weight.

    PEFT runs them; our reference layers do for what it cannot load or run right (`_is_for_peft`). `dtype` "float64" is
    the truth. `change` is let at the base's weights before the adapters are put beside them or, with `merged`, at the
    weights that PEFT's own merge gives. The model's class is the one `artifact`'s config names.
    """
    import torch

    kind, config = class_and_config(artifact, base)
    # Where training began from another weight than the base's, that is made of the weight as it is stored.
    started = any(starts_elsewhere(one.method) for adapter in added.adapters for one in adapter.trained.values())
    with quiet():
        loaded = "auto" if started else getattr(torch, dtype)
        model = load_model(kind, base, config, dtype=loaded, ignore_mismatched_sizes=True)
        resize(model, artifact)
        kept: list[tuple[Any, torch.Tensor]] = []
        if change is not None and not merged:
            change(model)
            heads = {name for one in added.adapters for name in one.trained if f"{name}.weight" in one.saved}
            kept = [(part, part.weight.detach().clone()) for name, part in model.named_modules() if name in heads]
        wide = torch.float64 if dtype == "float64" else torch.float32
        if _is_for_peft(added, model):
            model = _with_peft(added, model, wide, getattr(torch, dtype) if started else None)
            for module, weight in kept:  # with a head PEFT saves, and loads, the weight that it had
                module.weight.data.copy_(weight)
        else:
            from fossil_export.verifying._layers import attach

            if merged:
                raise FossilExportError(
                    f"{added.adapters[0].path}: PEFT cannot load it, and its merge is what int4 is checked by"
                )
            model = attach(model, added, wide, _outdated(added))
            if started:
                _cast(model, "trained", getattr(torch, dtype), wide)
        if change is not None and merged:
            model = model.merge_and_unload()
            change(model)
    return TorchRunner(model, device)


def _folder(adapter: Adapter) -> Path:
    return adapter.path if adapter.path.is_dir() else adapter.path.parent


def _is_for_peft(added: Sum, model: Any) -> bool:
    """Whether PEFT loads all of it and computes what was trained.

    It has no Bone any more and looks only for files of its own names; its MISS knows no Conv1D, has one variant for all
    adapters of a layer, and its bat does not see what other methods put around the same layer.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = _by_type(added)
    variants = {adapter.variant for adapter, _ in kinds.get("MISS", ())}
    methods = {one.method for adapter in added.adapters for one in adapter.trained.values()}
    depends = any(METHODS[method].COMBINES != "sum" for method in methods)
    return (
        all(one.is_pefts and not _unknown(one) for one in added.adapters)
        and all(_is_as_pefts(one) for one in added.adapters)
        and not (variants and any(isinstance(module, Conv1D) for module in model.modules()))
        and len(variants) < 2
        and not (len(kinds) > 1 and depends)
    )


def _unknown(adapter: Adapter) -> str:
    """What this PEFT does not know of an adapter: its type, or a field, which an older one passes over; "" if it knows
    all."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.peft_type)
    if kind is None:
        return adapter.peft_type
    known = {*kind.__dataclass_fields__, *OTHERS, *TRAINING, "peft_version"}  # what others write no PEFT knows
    return next((name for name, value in adapter.config.items() if value and name not in known), "")


def _outdated(added: Sum) -> str | None:
    """What is to be done if a newer PEFT would know more of the adapters; of Bone none does."""
    found = next((name for one in added.adapters if (name := _unknown(one)) and name != "BONE"), None)
    return found and f"PEFT {version('peft')}, which is here, does not know {found}: pip install --upgrade peft"


def _is_as_pefts(adapter: Adapter) -> bool:
    """Whether PEFT would load the file that was read."""
    names = [name for name in WEIGHTS if (_folder(adapter) / name).is_file()]
    return [path.name for path in adapter.files[1:]] == names[:1]


def _by_type(added: Sum) -> dict[str, list[tuple[Adapter, float]]]:
    """The adapters, with their weights, that one model of PEFT has."""
    found: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in added:
        found.setdefault(adapter.peft_type, []).append((adapter, weight))
    return found


def _cast(model: Any, own: str, dtype: Any, wide: Any) -> None:
    """Give parameters in what is named `own…` the dtype `wide`, the others `dtype` if there is one."""
    for name, parameter in model.named_parameters():
        target = wide if any(part.startswith(own) for part in name.split(".")) else dtype
        if target is not None:
            parameter.data = parameter.data.to(target)


def _with_peft(added: Sum, model: Any, wide: Any, dtype: Any = None) -> Any:
    """The model with all adapters active: those of one type in one model of PEFT, others in one around it."""
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    names = iter(["default", *(f"adapter{number}" for number in range(1, len(added.adapters)))])
    for number, pairs in enumerate(_by_type(added).values()):
        if number:
            model = model.get_base_model()
            del model.peft_config  # or PEFT takes these for its own
        own = {next(names): pair for pair in pairs}
        first, *others = own
        with peft_folder(own[first][0]) as folder:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name in others:
            with peft_folder(own[name][0]) as folder:
                model.load_adapter(str(folder), adapter_name=name)
        if others:
            model.base_model.set_adapter(list(own))
        if not any(adapter.peft_type == "LN_TUNING" for adapter, _ in pairs):  # its copies compute in the base's dtype
            _cast(model, model.base_model.prefix, dtype, wide)
        _scale(model, {name: weight for name, (_, weight) in own.items()})
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # of several models PEFT leaves only the last one's active
            module.set_adapter(next(iter(module.modules_to_save)), inference_mode=True)
    return model


def _scale(model: Any, weights: Mapping[str, float]) -> None:
    """Give each adapter its weight, in the layers of this model of PEFT."""
    if all(weight == 1.0 for weight in weights.values()):
        return
    for module in model.modules():
        if not isinstance(module, model.base_model.tuner_layer_cls):
            continue
        if hasattr(module, "set_scale"):
            for name, weight in weights.items():
                module.set_scale(name, weight)
        else:
            module.forward = _weighted(module, weights)


def _weighted(layer: Any, weights: Mapping[str, float]) -> Callable[..., Any]:
    """The forward pass of a layer that knows no weights: its base's, and w times what each adapter alone adds."""
    alone = layer.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        base = layer.base_layer(*inputs, **options)
        total = base
        for name, weight in weights.items():
            if name in _names(layer):
                layer.set_adapter([name], inference_mode=True)
                total = total + weight * (alone(*inputs, **options) - base)
        return total

    return forward


def _names(layer: Any) -> Iterable[str]:
    """The adapters that a layer has tensors of."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
