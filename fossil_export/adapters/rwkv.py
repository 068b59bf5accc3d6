"""State dicts that RWKV-PEFT wrote before it used PEFT: one `.pth` file, no config.

Keys are `blocks.N.att.receptance.disha` (also `.bone`), the module's name and the method's; the tensor's dimensions
say which variant it is, as in PEFT folders: 2-D (r, out) is tile, 3-D (out/r, r, r) is bat.
"""

from __future__ import annotations

from pathlib import Path

from fossil_export.adapters.adapter import Adapter, Shard
from fossil_export.adapters.pickled import read_pickled
from fossil_export.checkpoints.dtypes import FLOATS
from fossil_export.checkpoints.folder import Folder
from fossil_export.checkpoints.stamp import stamps_of
from fossil_export.errors import AdapterError, listed

ENDINGS = ("disha", "bone")


def is_state_dict(path: Path) -> bool:
    """Whether a path is a lone `.pth` file, with no PEFT config beside it."""
    return path.is_file() and path.suffix == ".pth" and not (path.parent / "adapter_config.json").is_file()


def load_state_dict(path: Path, source: Folder) -> Adapter:
    """Read such a file, which lies in `source`.

    Raises AdapterError for tensors that are no shards of one variant and rank."""
    stamps = stamps_of([path])
    tensors, pickled = read_pickled(path)
    shards: dict[str, Shard] = {}
    strangers = []
    for tensor in tensors:
        module, _, ending = tensor.name.rpartition(".")
        if ending not in ENDINGS or not module:
            strangers.append(tensor.name)
            continue
        if tensor.dtype not in FLOATS or 0 in tensor.shape:
            raise AdapterError(
                f"{path}: tensor {tensor.name} {list(tensor.shape)} is {tensor.dtype} or empty, no shard"
            )
        if module in shards:
            raise AdapterError(
                f"{path}: holds {module} twice, as {shards[module].tensor.name} and {tensor.name}; keep one"
            )
        if len(tensor.shape) == 2:
            shards[module] = Shard(module, "tile", tensor.shape[0], tensor)
        elif len(tensor.shape) == 3 and tensor.shape[1] == tensor.shape[2]:
            shards[module] = Shard(module, "bat", tensor.shape[1], tensor)
        else:
            raise AdapterError(f"{path}: {tensor.name} {list(tensor.shape)} is neither (r, out) nor (out/r, r, r)")
    if strangers:
        raise AdapterError(
            f"{path}: holds {listed(strangers)}, which are no shards (….disha, ….bone); this adapter was trained with "
            "more than FOSSIL, which fossil-export does not understand"
        )
    kinds = {(shard.variant, shard.rank) for shard in shards.values()}
    if len(kinds) != 1:
        raise AdapterError(f"{path}: holds {'no shards' if not kinds else 'shards of different variants or ranks'}")
    variant, rank = kinds.pop()
    return Adapter(
        path=path,
        peft_type="RWKV",
        variant=variant,
        rank=rank,
        base_model=None,
        base_revision=None,
        config={},
        shards=shards,
        saved={},
        files=(path,),
        source=source,
        pickled=pickled,
        stamps=stamps,
    )
