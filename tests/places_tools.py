"""Tiny models that PEFT trains beside, and what the live model and the merged one answer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import randomise
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fossil_export import MergeResult, merge, verify

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
IDS = torch.arange(2, 40)[None]


@dataclass(frozen=True)
class Scene:
    """A base, an adapter of it, and the live model, in float64."""

    folder: Path
    kind: Any
    live: Any

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def merge(self) -> MergeResult:
        """Merge; the result must answer as the live model does, other than the base, and be verified."""
        result = merge(self.adapter, self.merged, base=self.base)
        wanted = answer(self.live.double().eval())
        got = answer(opened(self.kind, self.merged))
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
        before = answer(opened(self.kind, self.base))
        assert before.shape != got.shape or not torch.allclose(before, wanted, rtol=0, atol=1e-4)
        found = verify(self.merged, level="weights")
        assert found.parity, found.problems
        return result


def opened(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float64, **eager(kind)).eval()


def eager(kind: Any) -> dict[str, str]:
    """Grouped products take no float64."""
    return {"experts_implementation": "eager"}


def answer(model: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        found = model(IDS, use_cache=False, **decoder)
    values: torch.Tensor = found.logits if "logits" in found else found[0]
    return values


def saved(model: Any, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model.apply(model._init_weights)  # the same weights in every test
    model.save_pretrained(folder / "base", **options)
    return folder / "base"


def scene(folder: Path, model: Any, kind: Any = LoraConfig, resize: int | None = None, **config: Any) -> Scene:
    """Let PEFT train beside `model`; what is in `folder` / "base" already is taken from there."""
    if not (folder / "base").is_dir():
        saved(model, folder)
    live = type(model).from_pretrained(folder / "base", **eager(type(model)))
    if resize is not None:
        live.resize_token_embeddings(resize, mean_resizing=False)
    if kind is LoraConfig:
        config = {"r": 4, "target_modules": ["q_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(live, kind(**config))
        randomise(peft_model)
        peft_model.save_pretrained(folder / "adapter")
    return Scene(folder, type(model), peft_model)


def edit_weights(folder: Path, change: Any) -> None:
    """Let `change` edit the tensors of a folder with one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        file,
        {"format": "pt"},
    )
