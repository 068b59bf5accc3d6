"""python -m sweep.bypassed: which linear layers a trainer does not call, though it computes with their weights.

An adapter there trains nothing: PEFT puts its update beside the call. Writes, by model type, the last two parts
of these layers' names to fossil_export/models/bypassed.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fossil_export.models._architecture import pattern_of
from sweep import building, inputs
from sweep.catalogue import entries, varied

FILE = Path(__file__).resolve().parents[2] / "fossil_export" / "models" / "bypassed.json"


def bypassed(model: nn.Module) -> set[str]:
    """Names of layers with weights that count and that are never called; empty where there are no inputs for it."""
    question = inputs.find(model)
    if question is None:
        return set()
    called: set[str] = set()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda *given, name=name: called.add(name)) for name, module in linear.items()
    ]
    before = inputs.outputs(model, question)
    for hook in hooks:
        hook.remove()
    return {
        pattern_of(name)
        for name, module in linear.items()
        if name not in called and _counts(model, module, question, before)
    }


def _counts(model: nn.Module, module: nn.Module, question: Any, before: list[torch.Tensor]) -> bool:
    kept: torch.Tensor = module.weight.data
    module.weight.data = kept + torch.randn_like(kept)
    after = inputs.outputs(model, question)
    module.weight.data = kept
    return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, set[str]] = {}
    for number, entry in enumerate(varied(list(entries()))):
        try:
            names = bypassed(building.build(entry.name))
        except Exception as problem:
            print(f"{entry.name}: {building.line(problem)}", file=sys.stderr)
            continue
        for name in names:
            found.setdefault(entry.model_type, set()).add(".".join(name.split(".")[-2:]))
        if names:
            print(number, entry.name, sorted(names), file=sys.stderr)
    lines = [f"{json.dumps(kind)}: {json.dumps(sorted(names))}" for kind, names in sorted(found.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
