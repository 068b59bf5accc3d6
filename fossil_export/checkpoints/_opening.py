"""How a base is opened: files are chosen, headers read, and quantized weights taken as the floats that they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fossil_export.checkpoints._checkpoint import Checkpoint, Quantized, view_rows
from fossil_export.checkpoints._choice import (
    INDEX_ENDING,
    PICKLED_INDEX_ENDING,
    RESAVE,
    by_name,
    check_index,
    choose,
    indexed_files,
    json_of,
    refuse_part,
    renamed,
)
from fossil_export.checkpoints._companions import MODELOPT, QUANTIZATION_FILES
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._folder import Folder, LocalFolder
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._stamp import stamps_of
from fossil_export.checkpoints._weights_file import is_pickle
from fossil_export.checkpoints.gguf import ENDING as GGUF
from fossil_export.checkpoints.gguf import read_model
from fossil_export.checkpoints.quantized import FORMATS, Stored, settings_of
from fossil_export.errors import CheckpointError


def open_checkpoint(where: Path | Folder, file: str | None = None) -> Checkpoint:
    """Open a model folder, or one weights file or index of it, without reading any weights.

    `where` is a path, or a folder elsewhere, of which `file` names the one to open. In a folder
    `model.safetensors` wins over its index, as in transformers, then come `pytorch_model.bin` and its index, and then
    the only other index or file: safetensors before files of PyTorch's, and these before GGUF. Raises CheckpointError
    when there are no weights, several sets of them, or damage.
    """
    if isinstance(where, Path):
        if not where.is_dir() and not where.is_file():
            raise CheckpointError(f"{where}: no such file or folder; name the base model with --base")
        home: Folder = LocalFolder(where if where.is_dir() else where.parent)
        file = None if where.is_dir() else where.name
    else:
        home = where
    root = home.root_names()
    if home.is_here and "config.json" not in root and os.path.lexists(path := home.path / "config.json"):
        raise CheckpointError(f"{path}: is a broken link or no regular file; put the file itself in its place")
    folder = home.path if file is None or "config.json" in root else None
    if file is None:
        index_name, weights = choose(home)
    elif file.endswith((INDEX_ENDING, PICKLED_INDEX_ENDING)):
        folder, index_name, weights = home.path, file, None
    elif file.endswith(".safetensors") or is_pickle(file):
        refuse_part(home, file)
        index_name, weights = None, file
    elif file.endswith(GGUF):
        index_name, weights = None, file
    else:
        raise CheckpointError(f"{home.path / file}: not a weights file; {RESAVE}")
    if file is None and weights is not None and weights.startswith("adapter_model.") and "adapter_config.json" in root:
        raise CheckpointError(f"{home.path}: is an adapter, and no base model; name the base with --base")
    if weights is not None and weights.endswith(GGUF):
        return _of_gguf(home, weights)

    index = index_path = None
    small = ("config.json", *([index_name] if index_name is not None else ()))
    stamps = stamps_of(home.path / name for name in small) if home.is_here else {}
    if index_name is not None:
        index_path = home.path / index_name
        index = json_of(home, index_name)
        files = home.headers(indexed_files(home, index_path, index))
    else:
        assert weights is not None
        files = home.headers([weights])
    files = renamed(files)
    tensors = by_name(files)
    if index is not None and index_path is not None:
        check_index(index_path, index["weight_map"], tensors)
    config = None
    if folder is not None and "config.json" in root:
        config = json_of(home, "config.json")
        _check_config(folder / "config.json", config)
        _check_named(folder / "config.json", config)
    return dequantized(Checkpoint(home, folder, files, index_path, index, config, tensors, stamps=stamps))


def _of_gguf(home: Folder, file: str) -> Checkpoint:
    model = read_model(home, file)

    def checkpoint(header: Header, quantized: Quantized | None) -> Checkpoint:
        return Checkpoint(
            model.home,
            model.home.path,
            (header,),
            None,
            None,
            model.config,
            by_name((header,)),
            quantized,
            made_of=header.path,
            notes=model.home.notes,
        )

    return checkpoint(model.header, Quantized("gguf", {}, checkpoint(model.stored, None)))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantized weights as floats under their plain names; itself if it has none that are
    known. Raises CheckpointError if its quantization is damaged, or contradicts the config."""
    settings = settings_of(checkpoint.config) or _settings_beside(checkpoint)
    where = str(checkpoint.location)
    metadata = {key: text for header in checkpoint.files for key, text in header.metadata.items()}
    rows_of = partial(view_rows, checkpoint.home)
    stored = Stored(where, checkpoint.tensors, checkpoint.config or {}, settings, rows_of, metadata)
    name = next((name for name, one in FORMATS.items() if one.describes(stored)), None)
    if name is None:
        return checkpoint
    coded = list(FORMATS[name].read(stored))
    by_first = {one.coding.stored[0].name: one for one in coded if one.coding is not None}
    taken = {info.name for one in coded if one.coding is not None for info in one.coding.stored}
    for one in coded:
        if one.name in checkpoint.tensors and one.name not in taken:
            raise CheckpointError(f"{where}: has {one.name} twice, quantized and as it is; fetch it again")

    def shown(info: TensorInfo) -> list[TensorInfo]:
        if info.name in by_first:
            return [by_first[info.name]]
        return [] if info.name in taken or FORMATS[name].passes_over(info, stored) else [info]

    _refuse_codes(stored, (one for info in checkpoint.tensors.values() for one in shown(info)))
    files = tuple(
        replace(
            header,
            tensors=tuple(one for info in header.tensors for one in shown(info)),
            metadata=FORMATS[name].plain_metadata(header.metadata),
            derived=True,
        )
        for header in checkpoint.files
    )
    return replace(
        checkpoint,
        files=files,
        config=None if checkpoint.config is None else FORMATS[name].plain_config(checkpoint.config),
        tensors=by_name(files),
        quantized=Quantized(name, settings or {}, checkpoint),
    )


def _refuse_codes(stored: Stored, left: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError for a tensor that only a scale could give a meaning, and that no format has taken."""
    for info in left:
        coded = info.dtype.startswith(("F8", "F6", "F4")) or info.name.endswith(".weight")
        if coded and info.coding is None and info.dtype not in FLOATS:
            raise stored.error(
                info, f"is stored as {info.dtype}, and config.json does not say how to read it; fetch the base again"
            )


def _settings_beside(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What folders say of their quantization in a file of its own; None if there is none, or nothing quantized."""
    names = checkpoint.home.root_names() if checkpoint.folder is not None else ()
    name = next((name for name in QUANTIZATION_FILES if name in names), None)
    if name is None:
        return None
    found = json_of(checkpoint.home, name)
    if name == MODELOPT:
        own = found.get("quantization")
        return {"quant_method": "modelopt", **own} if isinstance(own, dict) and own.get("quant_algo") else None
    if not any(name.endswith(".qweight") for name in checkpoint.tensors):
        return None
    return {"quant_method": "awq" if "w_bit" in found or "zero_point" in found else "gptq", **found}


def _check_named(path: Path, config: Mapping[str, Any]) -> None:
    """transformers from 5.0 on reads the file that `transformers_weights` names, whatever else is there."""
    if (named := config.get("transformers_weights")) is not None:
        raise CheckpointError(
            f"{path}: transformers_weights names {named!r}, which transformers loads whatever else is there; give that "
            "file the usual name (model.safetensors, or that of its index), and take the field out"
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The fields that are looked at have the types that transformers gives them."""
    for name, kind in (("text_config", dict), ("architectures", list), ("id2label", dict)):
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, not a {kind.__name__}; fetch it again")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        # Loaders do not agree on what 1 or "true" is.
        if not isinstance(tie := part.get("tie_word_embeddings", False), (bool, type(None))):
            raise CheckpointError(f"{path}: tie_word_embeddings is {tie!r}, not true or false; mend it")
