"""An adapter as PEFT may load it: nothing in its folder has PEFT import a module, or PyTorch load a pickle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fossil_export.adapters import Adapter
from fossil_export.adapters._peft import CONFIG
from fossil_export.checkpoints._dtypes import FLOATS, WHOLE
from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints._jsonfile import read_json, write_json
from fossil_export.errors import AdapterError
from fossil_export.writing._scratch import scratch_folder

# Fields that only say how training began or ran; PEFT imports the modules and reads the files that some of them name.
TRAINING = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "revision", "runtime_config",
}  # fmt: skip


@contextmanager
def peft_folder(adapter: Adapter) -> Iterator[Path]:
    """A folder with its config, without what only training needs, and its weights as safetensors, as long as the block
    runs. Raises AdapterError and OSError."""
    own, weights = adapter.files[:2]
    config = read_json(own, AdapterError)
    with scratch_folder() as folder:
        (folder / CONFIG).write_bytes(write_json({key: config[key] for key in config if key not in TRAINING}))
        copy = folder / "adapter_model.safetensors"
        if weights.suffix == ".safetensors":
            copy.symlink_to(weights.absolute())
        else:
            _write(adapter, copy)
        yield folder


def _write(adapter: Adapter, path: Path) -> None:
    """The tensors of a pickled adapter as a safetensors file."""
    known = (*FLOATS, *WHOLE)
    infos = [info for header in adapter.headers for info in header.tensors if info.dtype in known]
    with path.open("wb") as file:
        file.write(encode_header(((info.name, info.dtype, info.shape) for info in infos), {"format": "pt"}))
        for info in infos:
            file.write(np.ascontiguousarray(adapter.array(info)).tobytes())
