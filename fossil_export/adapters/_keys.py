"""Keys of adapter files as other tools than PEFT's `save_pretrained` write them, brought into PEFT's form.

| in a key | writer |
|---|---|
| `_orig_mod` | torch.compile (`OptimizedModule` in torch/_dynamo/eval_frame.py), of regions `compile_regions` in accelerate/utils/other.py |
| `_fsdp_wrapped_module` | torch/distributed/fsdp/_common_utils.py; PEFT takes it off its own names (peft/utils/save_and_load.py) |
| `_checkpoint_wrapped_module` | torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py, used by axolotl (core/trainers/mixins/activation_checkpointing.py) |
| `lora_A.default.weight` | `lora_state_dict` in swift/tuners/lora_layers.py (modelscope/ms-swift), and whole state dicts of a PeftModel |
| `modules_to_save.default`, `original_module` | whole state dicts of a PeftModel, as FSDP's and DeepSpeed's |
| `module.` before all | torch.nn.parallel.DistributedDataParallel, of a whole state dict |
| no `base_model.model.` | `SwiftModel.state_dict` in swift/tuners/base.py; transformers' `save_pretrained(save_peft_format=False)` |

The adapter may have another name than `default`, if there is one alone; a number there is the number of an expert.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import AdapterError

PREFIX = "base_model.model."
_ROOT = "base_model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_NAME = "default"
_PARALLEL = "module."
_KEPT = "modules_to_save"


def peft_keys(file: Path, tensors: Sequence[TensorInfo], endings: Iterable[str]) -> dict[str, TensorInfo]:
    """The tensors by the key that PEFT would give them; `endings` are those of trained tensors.

    Raises AdapterError for two tensors that would have the same.
    """
    endings = tuple(endings)
    given = [tensor.name for tensor in tensors]
    if all(name.startswith(f"{_PARALLEL}{_ROOT}") for name in given):
        given = [name.removeprefix(_PARALLEL) for name in given]
    adapter = _adapter_name(given, endings)
    plain = [_unwrapped(name, endings, adapter) for name in given]
    if not any(name.startswith(_ROOT) for name in plain):
        plain = [PREFIX + name for name in plain]
    found: dict[str, TensorInfo] = {}
    for name, tensor in zip(plain, tensors, strict=True):
        other = found.get(name)
        if other is not None and _is_copy(tensor) != _is_copy(other) and tensor.shape == other.shape:
            found[name] = other if _is_copy(tensor) else tensor
            continue
        if other is not None:
            raise AdapterError(
                f"{file}: holds {name} twice, as {other.name} and {tensor.name}; keep the tensors of one adapter"
            )
        found[name] = tensor
    return found


def _is_copy(tensor: TensorInfo) -> bool:
    """Whether PEFT wrote it beside the same tensor by its plain name: with bias="all" it collects by name the biases
    within modules_to_save, and then those modules once more."""
    return f".{_KEPT}.{_NAME}." in tensor.name


def are_pefts(keys: Mapping[str, TensorInfo]) -> bool:
    """Whether the file has them like that, so that PEFT loads it."""
    return all(name == tensor.name for name, tensor in keys.items())


def _adapter_name(names: Sequence[str], endings: Iterable[str]) -> str:
    """The adapter's name in the keys of trained tensors, if all that have one have the same."""
    found: set[str] = set()
    for head, tail in {(head, tail) for head, _, tail in (ending.partition(".") for ending in endings) if tail}:
        pattern = re.compile(rf"\.{re.escape(head)}\.([^.]+)\.{re.escape(tail)}$")
        found |= {match[1] for match in map(pattern.search, names) if match is not None}
        if any(name.endswith(f".{head}.{tail}") for name in names):
            return _NAME  # some have no name: they may be of two adapters
    only = next(iter(found)) if len(found) == 1 else _NAME
    return _NAME if only.isdigit() else only


def _unwrapped(name: str, endings: Iterable[str], adapter: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for at in range(len(parts) - 2, 0, -1):
        if parts[at : at + 2] in ([_KEPT, _NAME], [_KEPT, adapter]):
            del parts[at : at + 2]
    plain = ".".join(parts)
    for ending in endings:
        head, _, tail = ending.partition(".")
        named = f".{head}.{adapter}" + (f".{tail}" if tail else "")
        if plain.endswith(named):
            return f"{plain.removesuffix(named)}.{ending}"
    return plain
