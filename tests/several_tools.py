"""Adapters that were trained differently."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import make_adapter
from safetensors.torch import load_file, save_file


def trained(folder: Path, base: Path, seed: int, with_embeddings: bool = False, **config: object) -> Path:
    """An adapter at `folder`, which PEFT makes and saves, of random values that are another seed's others."""

    def change(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data += noise.to(parameter.dtype)

    make_adapter(folder, base, change, **config)  # type: ignore[arg-type]
    if not with_embeddings:  # as `save_embedding_layers=False` leaves them out
        file = folder / "adapter_model.safetensors"
        state = {name: value for name, value in load_file(file).items() if ".base_layer." not in name}
        save_file(state, file, {"format": "pt"})
    return folder
