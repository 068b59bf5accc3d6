"""GGUF files as checkpoints of transformers: the floats that it would load, under the names that it would save."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._extras import needs_transformers_5
from fossil_export._shown import short
from fossil_export.checkpoints._header import Header, TensorInfo
from fossil_export.checkpoints._jsonfile import json_in
from fossil_export.checkpoints._stamp import Stamp
from fossil_export.checkpoints.gguf._coding import can_dequantize
from fossil_export.checkpoints.gguf._families import FAMILIES, REMEDY, ROPE, Weights
from fossil_export.checkpoints.gguf._file import GgufFile, read_gguf
from fossil_export.checkpoints.gguf._home import MadeFolder
from fossil_export.checkpoints.gguf._losses import losses
from fossil_export.errors import CheckpointError, FossilExportError, listed
from fossil_export.writing._scratch import Scratch

if TYPE_CHECKING:
    from fossil_export.checkpoints._folder import Folder
    from fossil_export.models._gguf import Made

ENDING = ".gguf"
HEAD = "output.weight"
WRITTEN_AS = "model.safetensors"


@dataclass(frozen=True)
class GgufModel:
    """The model of a GGUF file: its `home` with config and tokenizer, the `header` that stands for the file with the
    tensors of transformers, that with its own (`stored`), and the config."""

    home: MadeFolder
    header: Header
    stored: Header
    config: Mapping[str, Any]


def read_model(home: Folder, name: str) -> GgufModel:
    """The model in the GGUF file `name` of `home`; only its head is read.

    Raises CheckpointError for a file that is damaged or that transformers makes no such model of, naming the tensor,
    and MissingExtraError without gguf or transformers.
    """
    file = read_gguf(home, name)
    if file.architecture not in FAMILIES:
        raise CheckpointError(
            f"{file.path}: is a model of llama.cpp's {short(file.architecture)}, and read are {', '.join(FAMILIES)}; "
            f"{REMEDY}"
        )
    for kind in dict.fromkeys(one.kind for one in file.tensors.values()):
        if not can_dequantize(kind):
            first = next(one.name for one in file.tensors.values() if one.kind == kind)
            raise CheckpointError(f"{file.path}: {first} is stored as {kind}, which gguf does not dequantize; {REMEDY}")
    beside = read_config(home) if "config.json" in home.root_names() else None
    made = _made(file, beside)
    weights = Weights(file.architecture, file.tensors, made.config)
    if HEAD in file.tensors and made.ties:
        made = _untied(made, weights.names(made.shapes).get(HEAD))
    tensors = tuple(weights.read(made.shapes, made.ties))
    left = [one for one in file.tensors if one not in weights.taken and one not in ROPE]
    if left:
        raise CheckpointError(
            f"{file.path}: transformers' {file.architecture} has no place for {listed(left)}; {REMEDY}"
        )
    path = home.path / name
    stamp = Stamp.of(path.stat()) if path.is_file() else None

    def header(tensors: tuple[TensorInfo, ...]) -> Header:
        return Header(path, file.head, file.size, tensors, {"format": "pt"}, stamp, True, WRITTEN_AS)

    stored = header(tuple(one.codes for one in file.tensors.values()))
    config = json.loads(made.files["config.json"])
    folder = MadeFolder(home, name, made.files, partial(_save_tokenizer, file), losses(file, made))
    return GgufModel(folder, header(tensors), stored, config)


def read_config(home: Folder) -> dict[str, Any]:
    """The config.json that lies beside a GGUF file."""
    return json_in(home, "config.json", CheckpointError)


def _untied(made: Made, head: str | None) -> Made:
    """The model whose head is a tensor of its own, as the file has it, although the config ties it: transformers does
    not tie then, but leaves the config as it is."""
    if head not in made.ties:
        return made
    ties = {name: source for name, source in made.ties.items() if name != head}
    config = json.dumps(json.loads(made.files["config.json"]) | {"tie_word_embeddings": False}, indent=2) + "\n"
    return replace(made, files={**made.files, "config.json": config.encode()}, ties=ties)


def _made(file: GgufFile, beside: Mapping[str, Any] | None) -> Made:
    from fossil_export.models import _gguf

    arch = file.architecture
    vocabulary = file.metadata.get("tokenizer.ggml.tokens")
    tokens = len(vocabulary) if isinstance(vocabulary, list) else vocabulary
    without = {f"tokenizer.ggml.{key}" for key in ("merges", "scores", "token_type")}
    more = {}
    if "vocab_size" in _gguf.keys_read(arch) and isinstance(tokens, int):
        # Told by a number, a vocabulary need not be read.
        without.add("tokenizer.ggml.tokens")
        if f"{arch}.vocab_size" not in file.metadata:
            more[f"{arch}.vocab_size"] = tokens
    needs_transformers_5(f"{file.path}: a GGUF file as a base")
    with _Head(file, file.without(without, more)) as (path, folder):
        try:
            return _gguf.make(path, folder, arch, beside)
        except FossilExportError:
            raise
        except Exception as problem:  # what foreign code raises for a strange file is not ours to list
            raise CheckpointError(
                f"{file.path}: transformers makes no {arch} of its metadata ({_line(problem)}); {REMEDY}"
            ) from problem


def _save_tokenizer(file: GgufFile, folder: Path) -> Iterator[str]:
    """What there is to say if it cannot be had."""
    from fossil_export.models import _gguf

    with _Head(file, file.without(set(), {})) as (path, made):
        try:
            _gguf.save_tokenizer(path, made)
        except Exception as problem:  # see _made
            yield (
                f"{file.path}: transformers makes no tokenizer of it ({_line(problem)}); put that of the original "
                "model beside the merged one"
            )
        else:
            for small in made.iterdir():
                shutil.copyfile(small, folder / small.name)


class _Head:
    """A file of the size of the GGUF file that has only its head, and an empty folder."""

    def __init__(self, file: GgufFile, head: bytes) -> None:
        self._file, self._head = file, head
        self._scratch = Scratch()

    def __enter__(self) -> tuple[Path, Path]:
        root = self._scratch.path
        path, made = root / "model.gguf", root / "made"
        made.mkdir()
        path.write_bytes(self._head)
        os.truncate(path, len(self._head) + self._file.size)  # a hole: no byte of it is written
        return path, made

    def __exit__(self, *problem: object) -> None:
        self._scratch.close()


def _line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)[:200]
