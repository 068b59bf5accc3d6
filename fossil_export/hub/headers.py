"""Headers of a model on the Hub: names and shapes of its tensors, by a few range requests of kilobytes."""

from __future__ import annotations

import os
import re

from fossil_export.errors import CheckpointError, MissingExtraError

_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be `user/repo[@revision]`; a path that exists is looked for before."""
    return _ID.match(name) is not None and not name.startswith((".", "/", "~"))


def remote_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the safetensors model `name` on the Hub; no weights are fetched.

    The Hub's own client reads them, with HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE as its users know them. Raises
    CheckpointError with the remedy, MissingExtraError without the client.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as problem:
        raise MissingExtraError("huggingface-hub", "hub", "reading a model's headers on the Hub") from problem
    repository, _, revision = name.partition("@")
    try:
        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).get_safetensors_metadata(
            repository, revision=revision or None
        )
    except Exception as problem:  # the client's own classes, and those of what it is built on
        why = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise CheckpointError(
            f"{name}: is no file or folder here, and its headers cannot be read on the Hub ({why}); download the "
            "model, or name its config.json with --base-config"
        ) from problem
    return {
        tensor: tuple(info.shape) for file in found.files_metadata.values() for tensor, info in file.tensors.items()
    }
