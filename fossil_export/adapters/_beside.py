"""What lies beside an adapter, or in its place: more of what was trained, or the way to it.

| file or folder | writer |
|---|---|
| `pytorch_model.bin` with `v_head.…` | `PreTrainedModelWrapper.save_pretrained` in TRL (trl/experimental/ppo/modeling_value_head.py, before that trl/models/modeling_base.py) |
| `value_head.safetensors`, `value_head.bin` | `fix_valuehead_checkpoint` in LLaMA-Factory (src/llamafactory/train/callbacks.py) |
| `relora/` | `ReLoRACallback` in axolotl (src/axolotl/monkeypatch/relora.py): the base, which earlier updates were added to |
| `extra_states/` | `SwiftModel.save_pretrained` in ms-swift (swift/tuners/base.py): whole weights, beside the folder of each adapter |
| `additional_config.json` | `LoraConfig.save_pretrained` in ms-swift (swift/tuners/peft.py): how training ran |
| `checkpoint-N/`, `default/` | transformers' Trainer; PEFT and ms-swift for an adapter of that name |
| `pytorch_model_fsdp_0/`, `adapter_model.safetensors.index.json` | accelerate (utils/fsdp_utils.py); axolotl (src/axolotl/train.py) |
"""  # noqa: E501

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import AdapterError, listed

_CONFIG = "adapter_config.json"
_SWIFT = "additional_config.json"
_SWIFT_FIELDS = {"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"}
_VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
_MODEL = "pytorch_model.bin"
_SMALL = 4 << 20
# A file of a value head alone is far smaller, one of a model far larger.


def adapters_in(names: Iterable[str]) -> list[str]:
    """The subfolders that hold an adapter, the one of the last training step first, then by name."""
    found = [name.rpartition("/")[0] for name in names if name.endswith(f"/{_CONFIG}")]

    def step(folder: str) -> int:
        number = re.fullmatch(r"(?:.*/)?checkpoint-(\d+)", folder)
        return int(number[1]) if number is not None else -1

    return sorted(found, key=lambda folder: (-step(folder), folder.count("/"), folder))


def only_one_in(home: Folder) -> str | None:
    """The subfolder that holds an adapter, if there is exactly one, and none in the folder itself."""
    root = home.root_names()
    if _CONFIG in root or any(name.startswith(("adapter_model", "adapters.")) for name in root):
        return None
    found = adapters_in(_below(home))
    return found[0] if len(found) == 1 else None


def elsewhere(where: str, home: Folder) -> str:
    """How to go on from a folder that is no adapter itself, as the end of a message; "" if nothing is known. `where` is
    what the user may type for it."""
    names = _below(home)
    if found := adapters_in(names):
        last = found[0].rpartition("/")[2].startswith("checkpoint-")
        return (
            f"; it holds {len(found)} in subfolders ({listed(found)}): name one of them, "
            f"{'the newest' if last else 'one'} is {where}/{found[0]}"
        )
    if any(name.startswith("pytorch_model_fsdp_0/") for name in names):
        return "; its weights are in shards of FSDP, put them together with `accelerate merge-weights`"
    return ""


def refuse_lost(home: Folder, name: str) -> None:
    """Raise AdapterError if something that was trained with the adapter in `home` lies outside its file."""
    root = set(home.root_names())
    for file in _VALUE_HEADS:
        if file in root:
            raise AdapterError(_lost(home.path / file, "a value head"))
    if _MODEL in root and home.size(_MODEL) <= _SMALL and _has_value_head(home):
        raise AdapterError(_lost(home.path / _MODEL, "a value head (v_head)"))
    parent = home.path.parent
    if any(other.startswith("relora/") for other in _below(home)) or (
        home.path.name == "adapter" and (parent / "relora").is_dir()
    ):
        raise AdapterError(
            f"{name}: is a checkpoint of ReLoRA, which added earlier updates to the base, so that this one alone is "
            "not what was trained; take the model that the training wrote at its end"
        )
    if home.is_here and (parent / "extra_states" / _CONFIG).is_file():
        raise AdapterError(_lost(parent / "extra_states", "whole weights"))
    if _SWIFT in root:
        home.fetch([_SWIFT])
        fields = read_json(home.path / _SWIFT, AdapterError)
        if unknown := sorted(fields.keys() - _SWIFT_FIELDS):
            raise AdapterError(
                f"{home.path / _SWIFT}: sets {listed(unknown)}, which fossil-export does not understand; the merge "
                "could be wrong, so it stops here (a newer version may know it)"
            )


def _below(home: Folder) -> tuple[str, ...]:
    """The files in `home` and in its folders; on this machine in no deeper ones, of which there may be any number."""
    if not home.is_here:
        return tuple(home.names())
    found = (*home.path.glob("*"), *home.path.glob("*/*"))
    return tuple(sorted(path.relative_to(home.path).as_posix() for path in found if path.is_file()))


def _lost(path: Path, what: str) -> str:
    return (
        f"{path}: holds {what}, trained with the adapter, which no merged model has a place for; move it out of the "
        "folder to merge the rest"
    )


def _has_value_head(home: Folder) -> bool:
    """Whether a pickled state dict names `v_head.…`. The pickle is looked at as bytes, and never run."""
    home.fetch([_MODEL])
    path = home.path / _MODEL
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                return any(b"v_head." in _pickle(file, entry) for entry in file.infolist())
        return b"v_head." in path.read_bytes()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as problem:
        raise AdapterError(
            f"{path}: cannot be read ({problem}); fetch it again, or move it out of the folder"
        ) from problem


def _pickle(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The entry of names and shapes, b"" for another one. A small archive may unpack to more than there is memory: all
    that PyTorch's own reader unpacks does so piece by piece."""
    if not entry.filename.endswith("data.pkl"):
        return b""
    if entry.file_size > _SMALL or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{entry.filename} is not packed as PyTorch does")
    with file.open(entry) as unpacked:
        return unpacked.read(_SMALL)
