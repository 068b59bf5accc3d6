"""State dicts that RWKV-PEFT wrote before it used PEFT: one `.pth` file, no config.

Keys are `blocks.N.att.receptance.disha` (also `.bone`), the module's name and the method's; the tensor's dimensions
say which variant it is, as in PEFT folders: 2-D (r, out) is tile, 3-D (out/r, r, r) is bat.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from fossil_export.adapters._adapter import Adapter
from fossil_export.adapters._pickled import read_pickled
from fossil_export.adapters._trained import by_module, methods_of_state_dicts, split_key, trained_in
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints._stamp import stamps_of
from fossil_export.errors import AdapterError, listed


def is_state_dict(path: Path) -> bool:
    """Whether a path is a lone `.pth` file, with no PEFT config beside it."""
    return path.is_file() and path.suffix == ".pth" and not (path.parent / "adapter_config.json").is_file()


def load_state_dict(path: Path, home: Folder) -> Adapter:
    """Read such a file, which lies in `home`.

    Variant and rank may differ between modules. Raises AdapterError for tensors that are no shards."""
    stamps = stamps_of([path])
    header, pickled = read_pickled(path)
    methods = methods_of_state_dicts()
    endings = dict.fromkeys(ending for roles in methods.values() for ending in roles)
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    strangers = []
    for tensor in header.tensors:
        split = split_key(tensor.name, endings)
        if split is None:
            strangers.append(tensor.name)
            continue
        module, ending = split
        if tensor.dtype not in FLOATS or 0 in tensor.shape:
            raise AdapterError(
                f"{path}: tensor {tensor.name} {list(tensor.shape)} is {tensor.dtype} or empty, no shard"
            )
        found[module][ending] = tensor
    trained = by_module(one for module, own in found.items() for one in trained_in(path, module, own, methods, {}))
    if strangers:
        known_endings = ", ".join(f"….{ending}" for ending in endings)
        raise AdapterError(
            f"{path}: holds {listed(strangers)}, which are no shards ({known_endings}); this adapter was trained with "
            "more than FOSSIL, which fossil-export does not understand"
        )
    if not trained:
        raise AdapterError(f"{path}: holds no shards")
    return Adapter(
        path=path,
        peft_type="RWKV",
        base_model=None,
        base_revision=None,
        config={},
        trained=trained,
        saved={},
        files=(path,),
        home=home,
        pickled=pickled,
        headers=(header,),
        stamps=stamps,
    )
