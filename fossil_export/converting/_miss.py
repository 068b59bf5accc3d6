"""To today's PEFT `MISS` folder: Bone folders of older PEFT versions, and state dicts of RWKV-PEFT.

The tensors stay as they are; only their names and the config change. Sources: peft/tuners/bone up to PEFT 0.18 and
peft/tuners/miss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fossil_export._progress import counted
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.converting._form import finite
from fossil_export.converting._options import Options
from fossil_export.converting._record import write_record
from fossil_export.converting._tasks import task_of
from fossil_export.errors import AdapterError, naming

_BIASES = {"bone_only": "miss_only"}
_INITS = {"tile": True, "mini": "mini", "bat": "bat"}
# By variant: what MISS calls init_weights.


def write(adapter: Adapter, output: Path, options: Options) -> dict[str, Any]:
    """Fill the folder `output`: adapter_config.json and adapter_model.safetensors.

    Raises AdapterError for another method than FOSSIL.
    """
    if adapter.variant not in _INITS:
        raise AdapterError(
            f"{adapter.path}: is a {adapter.variant} adapter, of which PEFT's MISS has no form; convert it --to lora"
        )
    if len({trained.rank for trained in adapter.trained.values()}) > 1:
        raise AdapterError(
            f"{adapter.path}: has shards of different variants or ranks, of which PEFT's MISS has no form; convert it "
            "--to lora"
        )
    names = {
        **{
            f"base_model.model.{module}.miss_block": info
            for module, trained in adapter.trained.items()
            for info in trained.tensors.values()
        },
        **{info.name: info for info in adapter.saved.values()},
    }
    for module in adapter.trained:
        finite(adapter, module)
    with (output / "adapter_model.safetensors").open("wb") as file:
        file.write(encode_header(((name, info.dtype, info.shape) for name, info in names.items()), {"format": "pt"}))
        for info in counted(names.values(), "writing", len(names), "tensors"):
            file.write(np.ascontiguousarray(adapter.array(info)).tobytes())
    (output / "adapter_config.json").write_bytes(write_json(_config(adapter, options)))
    for name, path in adapter.tokenizer().items():
        with naming(path):
            content = path.read_bytes()
        (output / name).write_bytes(content)
    details = {"rank": adapter.rank, "modules": len(adapter.trained), "variant": adapter.variant}
    write_record(output, adapter, options, "miss", details)
    return details


def _config(adapter: Adapter, options: Options) -> dict[str, Any]:
    given = adapter.config
    kept = ("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")
    bias = given.get("bias") or "none"
    first = next(iter(adapter.trained.values()))
    return {
        **{name: given.get(name) for name in kept},
        "task_type": task_of(adapter),
        "base_model_name_or_path": options.base_id,
        "bias": _BIASES.get(bias, bias),
        "inference_mode": True,
        "init_weights": _INITS[adapter.variant],
        "mini_r": first.shapes["D"][1] if adapter.variant == "mini" else 1,
        "miss_dropout": 0.0,
        "peft_type": "MISS",
        "r": adapter.rank,
        "revision": options.base_revision,
        "target_modules": given.get("target_modules") or sorted(adapter.trained),
    }
