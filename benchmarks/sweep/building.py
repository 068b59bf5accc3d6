"""A tiny random model of a class, saved as transformers saves it and read back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sweep.catalogue import model_class
from sweep.shrinking import variants

LARGEST = 4_000_000  # parameters
_EMERGENCY = 25_000_000


class Unbuilt(Exception):
    """Why there is no model of a class."""


@dataclass(frozen=True)
class Base:
    """`model` is what `from_pretrained` gives for `folder`; `missing` is what its report says is not there."""

    name: str
    folder: Path
    model: Any
    missing: frozenset[str]


def build(name: str) -> Any:
    """The first model that the variants of its config give, float32, with every parameter random, ties kept."""
    try:
        kind = model_class(name)
    except AttributeError as problem:
        raise Unbuilt("only the mappings know this class") from problem
    reasons: list[str] = []
    for limit in (LARGEST, _EMERGENCY):
        try:
            found = _first(kind, name, limit, reasons)
        except Exception as problem:
            raise Unbuilt(f"no config: {line(problem)}") from problem
        if found is not None:
            return found
    raise Unbuilt(" / ".join(dict.fromkeys([reasons[0], reasons[-1]])) if reasons else "no variant of its config")


def _first(kind: Any, name: str, limit: int, reasons: list[str]) -> Any | None:
    for arguments in variants(name, kind.config_class):
        try:
            config = kind.config_class(**arguments)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(config).parameters())
        except Exception as problem:
            if "meta" not in str(problem) and not isinstance(problem, NotImplementedError):
                reasons.append(line(problem))
                continue
            size = 0
        if size > limit:
            reasons.append(f"{size:,} parameters")
            continue
        try:
            torch.manual_seed(zlib.crc32(name.encode()))
            model = kind(kind.config_class(**arguments)).float().eval()
        except Exception as problem:
            reasons.append(line(problem))
            continue
        randomise(model, name)
        return model
    return None


def randomise(model: Any, seed: str, size: float = 0.1, trained_only: bool = False) -> None:
    """Noise on every float parameter, once for each tensor, so that ties stay."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.requires_grad or not trained_only):
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.data = (torch.nan_to_num(parameter.data, 0.0, 0.0, 0.0).clamp(-10, 10) + noise).to(
                    parameter.dtype
                )


def saved(name: str, folder: Path) -> Base:
    """Raises Unbuilt where there is no model, or transformers does not read back what it wrote."""
    made = build(name)
    kind = type(made)
    try:
        made.save_pretrained(folder)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as problem:
        raise Unbuilt(f"transformers cannot save and load it: {line(problem)}") from problem
    loaded = state(model.eval())
    lost = [key for key, value in state(made).items() if key not in loaded or not torch.equal(value, loaded[key])]
    if lost:
        raise Unbuilt(f"transformers does not read back what it wrote: {lost[0]}, {len(lost)} in all")
    return Base(name, folder, model, frozenset(report["missing_keys"]))


def state(model: Any) -> dict[str, torch.Tensor]:
    """All that a file could hold, tied tensors under each of their names."""
    return {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}


def line(problem: BaseException) -> str:
    first = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {first}"[:300]
