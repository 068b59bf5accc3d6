"""Bases as `torch.save` writes them, beside the same ones as safetensors."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantized_bases import SIZES, adapter_for
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import fossil_export
from fossil_export.checkpoints._checkpoint import Checkpoint, view_rows
from fossil_export.checkpoints._coding import read_rows

State = dict[str, torch.Tensor]


def plain_base(folder: Path, dtype: str = "bfloat16", tied: bool = False) -> Path:
    """A random Llama as safetensors."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def pickled_base(base: Path, folder: Path, files: int = 1, zipped: bool = True) -> Path:
    """The base's folder with its weights in so many files of PyTorch's."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    write_state(folder, load_file(base / "model.safetensors"), files, zipped)
    return folder


def write_state(folder: Path, state: State, files: int = 1, zipped: bool = True) -> None:
    options: dict[str, Any] = {"_use_new_zipfile_serialization": zipped}
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return
    names = {name: f"pytorch_model-{at % files + 1:05d}-of-{files:05d}.bin" for at, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: state[name] for name, own in names.items() if own == file}, folder / file, **options)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def read_all(folder: Path) -> State:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merged_as(base: Path, other: Path, work: Path, **options: Any) -> Path:
    """Merge one adapter into `base` and into `other`, and hold the tensors of the first against the second's."""
    adapter = work / "adapter"
    if not adapter.exists():
        adapter_for(other, adapter)
    for name, one in (("of_base", base), ("of_other", other)):
        fossil_export.merge(adapter, work / name, base=one, **options)
    found, wanted = read_all(work / "of_base"), read_all(work / "of_other")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    return work / "of_base"


def values_of(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    info = checkpoint.tensors[name]
    found = read_rows(info, 0, info.shape[0], partial(view_rows, checkpoint.home))[:]
    return np.ascontiguousarray(found)
