"""A merged model: a checkpoint as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fossil_export.artifacts._kind import ADAPTER_CONFIG, Kind, Look
from fossil_export.checkpoints._companions import is_weights
from fossil_export.checkpoints._opening import open_checkpoint

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact


def _recognised(look: Look) -> bool:
    return look.has("*.safetensors") and look.peft_type is None


def _parts(folder: Path, names: tuple[str, ...], wanted: set[str]) -> set[str]:
    model = open_checkpoint(folder)
    index = {model.index_path.name} if model.index_path is not None else set()
    return wanted | {header.path.name for header in model.files} | index


def _is_loaded(name: str) -> bool:
    """Whether transformers or vLLM may take the file for the model's weights."""
    return is_weights(name) and (".safetensors" in name or (name.startswith("pytorch_model") and ".bin" in name))


def _opened(folder: Path) -> Artifact:
    from fossil_export.verifying._merged_folder import MergedFolder

    return MergedFolder(folder, open_checkpoint(folder))


KIND = Kind(
    name="merged",
    title="merged model",
    recognised=_recognised,
    opened=_opened,
    config="config.json",
    parts=_parts,
    whole=True,
    not_beside=frozenset({ADAPTER_CONFIG}),
    clash="holds an adapter, which loaders would put on top of the merged model",
    replaces=_is_loaded,
)
