"""To a PEFT LoRA folder, which PEFT, vLLM, SGLang, TGI and LoRAX serve.

Most adapters are LoRAs of the same rank, exactly (see `_form`). One whose update depends on the weight (bat) is not; it
gets the nearest LoRA of a rank, or of the rank that keeps a share of its energy, when the user asks for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.cards._frontmatter import BEGIN, END
from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.converting._form import exact_lora, lora_rank
from fossil_export.converting._options import Options
from fossil_export.converting._record import write_record
from fossil_export.converting._widths import Shapes, layer_shapes
from fossil_export.errors import AdapterError
from fossil_export.version import __version__

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

SERVED = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes (vllm/config/lora.py); SGLang's goes by the largest adapter loaded."""

_PREFIX = "base_model.model."
_BIASES = {"none": "none", "all": "all", "miss_only": "lora_only", "bone_only": "lora_only"}


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Fill the folder `output`: adapter_config.json, adapter_model.safetensors, README.md and the record."""
    exact_rank = lora_rank(adapter)
    approximate = exact_rank is None
    if approximate and options.rank is None and options.energy is None:
        raise AdapterError(
            f"{adapter.path}: is a {adapter.variant} adapter, which is no LoRA; ask for the nearest one with --rank "
            "N or --energy 0.99"
        )
    if not approximate and (options.rank is not None or options.energy is not None):
        raise AdapterError(f"{adapter.path}: is a LoRA of rank {exact_rank} exactly; leave --rank and --energy out")
    shapes, known = layer_shapes(adapter, options)
    details: dict[str, Any] = {"exact": not approximate}
    if exact_rank is None:
        from fossil_export.converting._nearest import nearest_lora

        rank, parts, report = nearest_lora(adapter, shapes, options)
        details |= report
    else:
        rank, parts = exact_rank, exact_lora(adapter, shapes)
    dtypes = {info.dtype for trained in adapter.trained.values() for info in trained.tensors.values()}
    dtype = "F32" if approximate or len(dtypes) > 1 else dtypes.pop()
    _write_weights(output / "adapter_model.safetensors", adapter, shapes, rank, dtype, parts)
    base = options.base_id
    config = _config(adapter, rank, known) | {"base_model_name_or_path": base, "revision": options.base_revision}
    (output / "adapter_config.json").write_bytes(write_json(config))
    (output / "README.md").write_text(_card(adapter, base, rank, approximate, details))
    for name, path in adapter.tokenizer().items():
        (output / name).write_bytes(path.read_bytes())
    write_record(output, adapter, options, "lora", {"rank": rank, **details})
    warnings = list(_warnings(adapter, rank, options.base_folder))
    return {"rank": rank, "modules": len(shapes), **details, "warnings": warnings}


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


def _config(adapter: Adapter, rank: int, known: frozenset[str]) -> dict[str, Any]:
    given = adapter.config
    bias = given.get("bias") or "none"
    if bias not in _BIASES:
        raise AdapterError(f"{adapter.path}: bias is {bias!r}, for which LoRA has no word")
    return {
        "auto_mapping": given.get("auto_mapping"),
        "bias": _BIASES[bias],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": given.get("modules_to_save"),
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules(adapter.trained, known),
        "task_type": given.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }


def _write_weights(
    path: Path, adapter: Adapter, shapes: Shapes, rank: int, dtype: str, parts: Iterator[tuple[str, Array, Array]]
) -> None:
    """A and B of every module, and what else the adapter holds under the names it has there; one module in memory."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for module in adapter.trained:
        outputs, inputs = shapes[module]
        entries.append((f"{_PREFIX}{module}.lora_A.weight", dtype, (rank, inputs)))
        entries.append((f"{_PREFIX}{module}.lora_B.weight", dtype, (outputs, rank)))
    entries += [(info.name, info.dtype, info.shape) for info in adapter.saved.values()]
    with path.open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for _, first, second in parts:
            for matrix in (first, second):
                file.write(np.ascontiguousarray(matrix, numpy_dtype(dtype)).tobytes())
        for info in adapter.saved.values():
            file.write(np.ascontiguousarray(adapter.array(info)).tobytes())


def _warnings(adapter: Adapter, rank: int, folder: str | None) -> Iterator[str]:
    if rank > SERVED[-1]:
        yield f"rank {rank} is more than the {SERVED[-1]} that vLLM serves; PEFT and SGLang take it"
    elif rank not in SERVED:
        yield f"vLLM serves rank {rank} with --max-lora-rank {next(step for step in SERVED if step > rank)}"
    elif rank > 16:
        yield f"vLLM needs --max-lora-rank {rank} (its default is 16)"
    if folder is not None:
        yield f"the base lies in the folder {folder} of its repository; PEFT and servers want it named apart"
    if adapter.saved:
        count = len(adapter.saved)
        yield f"it carries {count} whole trained tensors, which PEFT loads and vLLM refuses; merge for vLLM"


def _card(adapter: Adapter, base: str | None, rank: int, approximate: bool, details: Mapping[str, Any]) -> str:
    """What the folder is; `push` puts the whole model card in its place."""
    base = base or "the base model"
    if approximate:
        how = f"the nearest LoRA of rank {rank} (relative error of the update: {details['relative_error']:.2g})"
    else:
        how = f"exactly the FOSSIL adapter, as a LoRA of the same rank {rank}"
    return f"""---
library_name: peft
tags:
- lora
- fossil
---

{BEGIN}
# LoRA form of a FOSSIL adapter

For {base}; {how}. Made by fossil-export {__version__} from a {adapter.peft_type} adapter
({adapter.variant}, r = {adapter.rank}).

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this-folder")
```
{END}
"""
