"""Inputs for a forward pass, by the names that the model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

Inputs = dict[str, Any]


def computing(model: Any, dtype: torch.dtype) -> Any:
    """`model` itself, made to compute in `dtype`."""
    made = model.to(dtype).eval()
    for module in made.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # the others know no float64
    return made


def find(model: Any) -> Inputs | None:
    """The first inputs that this model takes with a finite answer; None if there are none."""
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


_GROUPS: tuple[tuple[str, ...], ...] = (
    (),
    ("decoder_input_ids",),
    ("input_ids",),
    ("input_ids", "bbox"),
    ("input_ids", "bbox", "decoder_input_ids"),
    ("pixel_values",),
    ("pixel_values", "input_ids"),
    ("pixel_values", "input_ids", "attention_mask"),
    ("pixel_values", "input_ids", "decoder_input_ids"),
    ("pixel_values", "input_ids", "bbox"),
    ("input_ids", "input_features"),
    ("input_ids", "input_features", "decoder_input_ids"),
    ("input_ids", "input_values"),
    ("input_values", "decoder_input_ids"),
    ("input_ids", "pixel_values_videos"),
)
_READINGS = 3


def _candidates(model: Any) -> Iterator[Inputs]:
    taken = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in taken else {}
    for reading in range(_READINGS):
        made = {name: value for name, value in _values(model, reading).items() if name in taken}
        needed = [name for name, entry in taken.items() if entry.default is entry.empty and name in made]
        main = getattr(model, "main_input_name", None)
        first = [*([main] if main in made else []), *needed]
        tried = set()
        for group in (*_GROUPS, tuple(made)):
            names = tuple(dict.fromkeys([*first, *(name for name in group if name in made)]))
            if names and names not in tried:
                tried.add(names)
                yield {name: made[name] for name in names} | fixed


def _values(model: Any, reading: int) -> Inputs:
    """Inputs by name. Families read some shapes otherwise: `reading` counts through them."""
    config = model.config
    text = _text(config)
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float64)
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens(*shape: int) -> torch.Tensor:
        top = min(100, int(_number(text, "vocab_size", 100)))
        made = torch.randint(min(5, top - 1), top, shape, generator=generator)
        end = vars(config).get("eos_token_id")
        if vars(config).get("is_encoder_decoder") and isinstance(end, int):
            made[..., -1] = end  # where some read the class from
        return made

    side = _size(_in(config, "image_size"), 64)
    channels = _number_in(config, "num_channels", _number_in(config, "in_channels", 3))
    channels = channels if channels in (1, 2, 3, 4, 9) else 3
    mels = [_number_in(config, name, 80) for name in ("num_mel_bins", "input_feat_per_channel", "feature_size")]
    mels.append(_number_in(config, "feature_projection_input_dim", mels[0]))
    frames = 2 * _number_in(config, "max_source_positions", 32)
    patch = _size(_in(config, "patch_size"), 14)
    cube = 3 * _size(_in(config, "temporal_patch_size"), 1) * patch * patch
    width = _number(text, "hidden_size", 32)
    audio = [(mels[0], frames), (frames, mels[1]), (frames, mels[3])][reading]
    ids = (1, 3, 8) if type(model).__name__.endswith("MultipleChoice") else (2, 8)
    return {
        "input_ids": tokens(*(ids if reading < 2 else (8, 8))),
        "decoder_input_ids": tokens(*((2, 5) if reading < 2 else (8, 5))),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "bbox": torch.arange(64).reshape(2, 8, 4) % 4 + torch.tensor([0, 0, 6, 6]),
        "pixel_values": noise(*[(2, channels, side, side), (2, 1, channels, side, side), (16, cube)][reading]),
        "pixel_values_videos": noise(2, _number_in(config, "num_frames", 4), channels, side, side),
        "input_features": noise(2, *audio),
        "input_values": noise(*[(2, 4000), (2, 1, 4000), (2, 16, mels[0])][reading]),
        "pixel_mask": torch.ones(2, side, side, dtype=torch.long),
        "past_values": noise(2, _number_in(config, "context_length", 16), _number_in(config, "num_input_channels", 3)),
        "hidden_states": noise(16, cube),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "query_embeds": noise(2, 4, width),
        "inputs": noise(2, 8, _number_in(config, "d_model", width)),
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
