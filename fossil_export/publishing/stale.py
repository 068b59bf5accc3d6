"""What a repository holds already that would be taken for a part of what is published."""

from __future__ import annotations

from collections.abc import Iterable

from fossil_export.adapters.peft import WEIGHTS
from fossil_export.cards import Facts
from fossil_export.checkpoints.companions import CERTIFICATE, PROVENANCE, is_weights
from fossil_export.errors import HubError, listed
from fossil_export.publishing.repository import Repository

_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def refuse_base(facts: Facts, repository: Repository, branch: str | None = None) -> None:
    """Raise HubError for a model that would replace its own base, on main or on the `branch` that was read: the next
    merge would be on top of this one."""
    own = facts.base is not None and facts.base.lower() == repository.repo_id.lower()
    onto = repository.revision or "main"
    if own and facts.kind in ("merged", "onnx") and not repository.create_pr and onto in ("main", branch):
        raise HubError(
            f"{repository.repo_id}: is the base itself, and the next merge would be on top of this one; choose another "
            "repository, or --revision or --create-pr"
        )


def stale(facts: Facts, there: Iterable[str]) -> list[str]:
    """Files of an earlier model: weights that would be loaded instead, a record and a certificate that are of others.

    Raises HubError where a merged model would meet an adapter, or an adapter a model: with an adapter in it, loaders
    take a repository's model for that of the adapter's base.
    """
    root = [name for name in there if "/" not in name]
    if facts.kind == "gguf-lora":  # files that stand for themselves
        return []
    found = [name for name in (PROVENANCE, CERTIFICATE) if name in root and name not in facts.files]
    if facts.kind == "merged":
        if "adapter_config.json" in root:
            raise HubError(
                f"{facts.repo_id}: holds an adapter, which loaders would put on top of the merged model; choose "
                "another repository"
            )
        found += [name for name in root if _is_loaded(name) and name not in facts.files]
    if facts.kind in ("lora", "miss"):
        if any(name in root for name in _MODEL):
            raise HubError(
                f"{facts.repo_id}: holds a whole model, which loaders would not find any more beside an adapter; "
                "choose another repository"
            )
        found += [name for name in WEIGHTS if name in root and name not in facts.files]
    return found


def removal_warnings(repo_id: str, removed: list[str]) -> list[str]:
    """What to say of files that went with the commit."""
    if not removed:
        return []
    return [
        f"{repo_id}: {listed(removed)} of an earlier model would have been taken for this one's and went with this "
        "commit; its history still has them"
    ]


def _is_loaded(name: str) -> bool:
    """Whether transformers or vLLM may take the file for the model's weights."""
    return is_weights(name) and (".safetensors" in name or (name.startswith("pytorch_model") and ".bin" in name))
