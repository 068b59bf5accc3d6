"""What a repository holds already that loaders would take instead of, or on top of, what is published."""

from __future__ import annotations

from collections.abc import Iterable

from fossil_export.cards import Facts
from fossil_export.checkpoints.companions import is_weights
from fossil_export.errors import HubError, listed

_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def stale(facts: Facts, there: Iterable[str]) -> list[str]:
    """Weights of an earlier model that would be loaded instead of a merged one.

    Raises HubError where a merged model would meet an adapter, or an adapter a model: with an adapter in it, loaders
    take a repository's model for that of the adapter's base.
    """
    root = [name for name in there if "/" not in name]
    if facts.kind == "merged":
        if "adapter_config.json" in root:
            raise HubError(
                f"{facts.repo_id}: holds an adapter, which loaders would put on top of the merged model; choose "
                "another repository"
            )
        return [name for name in root if _is_loaded(name) and name not in facts.files]
    if facts.kind in ("lora", "miss") and any(name in root for name in _MODEL):
        raise HubError(
            f"{facts.repo_id}: holds a whole model, which loaders would not find any more beside an adapter; choose "
            "another repository"
        )
    return []


def removal_warnings(repo_id: str, removed: list[str]) -> list[str]:
    """What to say of files that went with the commit."""
    if not removed:
        return []
    return [
        f"{repo_id}: {listed(removed)} of an earlier model would have been loaded instead and went with this commit; "
        "its history still has them"
    ]


def _is_loaded(name: str) -> bool:
    """Whether transformers or vLLM may take the file for the model's weights."""
    return is_weights(name) and (".safetensors" in name or (name.startswith("pytorch_model") and ".bin" in name))
