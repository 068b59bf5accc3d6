"""Inputs for a forward pass, by the names that the model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

Inputs = dict[str, Any]


def find(model: Any) -> Inputs | None:
    """The first inputs that this model (float64) takes with a finite answer; None if there are none."""
    for inputs in _candidates(model):
        try:
            answer = outputs(model, inputs)
        except Exception:
            continue
        if answer and all(bool(torch.isfinite(value).all()) for value in answer):
            return inputs
    return None


def outputs(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    """All float tensors of the answer, caches left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**{name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()})
    return list(_tensors(found))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif hasattr(value, "items"):
        for name, part in value.items():
            if name != "loss" and "past_key_values" not in name and "cache" not in name:
                yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _candidates(model: Any) -> Iterator[Inputs]:
    taken = inspect.signature(model.forward).parameters
    made = {name: value for name, value in _values(model).items() if name in taken}
    needed = [name for name, entry in taken.items() if entry.default is entry.empty and name in made]
    main = getattr(model, "main_input_name", None)
    first = [name for name in dict.fromkeys([*([main] if main in made else []), *needed])]
    for extra in ((), ("decoder_input_ids",), ("input_ids",), ("input_ids", "bbox"), ("pixel_values", "input_ids"),
                  ("pixel_values",), ("pixel_values", "input_ids", "decoder_input_ids"), ("input_ids", "input_features"),
                  ("input_ids", "pixel_values", "bbox"), ("input_ids", "decoder_input_ids", "input_features"),
                  ("input_ids", "input_values"), ("decoder_input_ids", "input_values"), ("input_ids", "pixel_values_videos"),
                  ("input_ids", "inputs_embeds"), tuple(made)):  # fmt: skip
        names = dict.fromkeys([*first, *(name for name in extra if name in made)])
        if names:
            yield {name: made[name] for name in names}


def _values(model: Any) -> Inputs:
    config = model.config
    text = _text(config)
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tokens(*shape: int) -> torch.Tensor:
        top = min(100, int(_number(text, "vocab_size", 100)))
        return torch.randint(min(5, top - 1), top, shape, generator=generator)

    side = _size(_in(config, "image_size"), 64)
    channels = _number_in(config, "num_channels", _number_in(config, "in_channels", 3))
    channels = channels if channels in (1, 2, 3, 4, 9) else 3
    mel = _number_in(config, "num_mel_bins", _number_in(config, "feature_size", 80))
    frames = 2 * _number_in(config, "max_source_positions", 32)
    video = _number_in(config, "num_frames", 4)
    return {
        "input_ids": tokens(2, 8),
        "decoder_input_ids": tokens(2, 5),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "bbox": torch.arange(64).reshape(2, 8, 4) % 4 + torch.tensor([0, 0, 6, 6]),
        "pixel_values": noise(2, channels, side, side),
        "pixel_values_videos": noise(2, video, channels, side, side),
        "input_features": noise(2, mel, frames),
        "input_values": noise(2, 4000),
        "inputs_embeds": noise(2, 8, _number(text, "hidden_size", 32)),
        "pixel_mask": torch.ones(2, side, side, dtype=torch.long),
        "past_values": noise(2, 16, 3),
    }


def _text(config: Any) -> Any:
    try:
        return config.get_text_config()
    except Exception:
        return config


def _in(config: Any, name: str) -> Any:
    """The first such value in the config or its parts."""
    if vars(config).get(name) is not None:
        return vars(config)[name]
    for part in vars(config).values():
        if hasattr(part, "to_dict"):
            found = _in(part, name)
            if found is not None:
                return found
    return None


def _number(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise


def _number_in(config: Any, name: str, otherwise: int) -> int:
    value = _in(config, name)
    return value if isinstance(value, int) and value > 0 else otherwise


def _size(value: Any, otherwise: int) -> int:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else otherwise
