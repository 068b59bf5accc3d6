"""The ways to train: what an adapter of each kind has, of a model at hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig

ALL = "all-linear"
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d)
_ATTENTION = re.compile(r"att|query|q_proj|self_?a", re.IGNORECASE)
_CLASSES = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Prediction|XVector)$")


@dataclass(frozen=True)
class Recipe:
    """Arguments of one of PEFT's configs, `kind`."""

    targets: str | tuple[str, ...]
    saved: tuple[str, ...] = ()
    kind: type[PeftConfig] = MissConfig
    more: tuple[tuple[str, Any], ...] = ()

    def config(self, rank: int) -> PeftConfig:
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return self.kind(r=rank, target_modules=targets, modules_to_save=list(self.saved) or None, **dict(self.more))


@dataclass(frozen=True)
class Parts:
    """Names of a model's parts: its linear layers, its convolutions, one of attention's layers, and the last words of
    the rest."""

    linears: tuple[str, ...]
    convolutions: tuple[str, ...]
    alone: tuple[str, ...]
    attention: str | None
    embedding: str | None
    head: str | None
    head_is_linear: bool
    norm: str | None
    classifier: str | None

    @property
    def narrow(self) -> str | None:
        """The last word of some layer that is neither head nor classifier."""
        return self.attention or next((_last(name) for name in self.alone if _last(name) != self.head), None)


def parts(model: Any) -> Parts:
    modules = dict(model.named_modules())
    linears = tuple(name for name, module in modules.items() if type(module) is torch.nn.Linear)
    embedding = _place(modules, _asked(model.get_input_embeddings))
    head = _place(modules, _asked(model.get_output_embeddings))
    mixed = {_last(name) for name, module in modules.items() if name not in linears}
    alone = [name for name in linears if _last(name) not in mixed]  # PEFT takes targets by their last word
    norms = [
        name
        for name, module in modules.items()
        if "Norm" in type(module).__name__ and any(True for _ in module.parameters())
    ]
    return Parts(
        linears,
        tuple(name for name, module in modules.items() if isinstance(module, _CONVOLUTIONS) and module.groups == 1),
        tuple(alone),
        next((_last(name) for name in alone if _ATTENTION.search(name) and name != head), None),
        embedding and _last(embedding),
        head and _last(head),
        head in linears,
        _last(norms[0]) if norms else None,
        _classifier(model, linears, head),
    )


def _asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:
        return None


def _place(modules: dict[str, Any], module: Any) -> str | None:
    return next((name for name, found in modules.items() if module is not None and found is module and name), None)


def _classifier(model: Any, linears: tuple[str, ...], head: str | None) -> str | None:
    if not _CLASSES.search(type(model).__name__):
        return None
    prefix = getattr(model, "base_model_prefix", "") or "?"
    outside = [name for name in linears if not name.startswith(f"{prefix}.") and name != head]
    return outside[-1].split(".")[0] if outside and len(outside) < len(linears) else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _linear(has: Parts, saved: tuple[str, ...] = ()) -> Recipe | None:
    """PEFT looks for the last words of all linear layers; where others have them too, whole names do."""
    if has.alone == has.linears:
        return Recipe(ALL, saved) if has.linears else None
    return Recipe(tuple(name for name in has.linears if _last(name) != has.head), saved)


def _narrow(has: Parts) -> Recipe | None:
    return Recipe((has.attention,)) if has.attention else None


def _saved(word: Callable[[Parts], str | None]) -> Callable[[Parts], Recipe | None]:
    def recipe(has: Parts) -> Recipe | None:
        saved = word(has)
        return Recipe((has.narrow,), (saved,)) if saved and has.narrow and saved != has.narrow else None

    return recipe


def _shard_on_head(has: Parts) -> Recipe | None:
    if not (has.head and has.head_is_linear):
        return None
    return Recipe(tuple(word for word in (has.narrow, has.head) if word))


def _both(has: Parts) -> Recipe | None:
    if not (has.embedding and has.head and has.narrow) or has.embedding == has.head:
        return None
    return Recipe((has.narrow,), (has.embedding, has.head))


def _embedding_and_shards(has: Parts) -> Recipe | None:
    return _linear(has, (has.embedding,)) if has.embedding else None


def _as_lora(make: Callable[[Parts], Recipe | None], **more: Any) -> Callable[[Parts], Recipe | None]:
    def recipe(has: Parts) -> Recipe | None:
        found = make(has)
        return found and replace(found, kind=LoraConfig, more=tuple(more.items()))

    return recipe


def _embedding_too(has: Parts) -> Recipe | None:
    return Recipe((has.narrow, has.embedding)) if has.narrow and has.embedding else None


def _convolutions(has: Parts) -> Recipe | None:
    return Recipe(has.convolutions) if has.convolutions else None


KINDS: dict[str, Callable[[Parts], Recipe | None]] = {
    "linear": _linear,
    "narrow": _narrow,
    "embedding": _saved(lambda has: has.embedding),
    "head": _saved(lambda has: has.head),
    "norm": _saved(lambda has: has.norm),
    "classifier": _saved(lambda has: has.classifier),
    "shard on head": _shard_on_head,
    "embedding and head": _both,
    "embedding and shards": _embedding_and_shards,
    "LoRA linear": _as_lora(_linear, lora_alpha=7),
    "LoRA and biases": _as_lora(_narrow, bias="all", use_rslora=True),
    "LoRA embedding": _as_lora(_embedding_too),
    "LoRA head": _as_lora(_shard_on_head),
    "LoRA convolution": _as_lora(_convolutions),
    "DoRA": _as_lora(_narrow, use_dora=True),
}
"""By the name in the table; None where a model has no such part."""


def recipes(model: Any) -> Iterator[tuple[str, Recipe]]:
    has = parts(model)
    for name, make in KINDS.items():
        recipe = make(has)
        if recipe is not None:
            yield name, recipe
