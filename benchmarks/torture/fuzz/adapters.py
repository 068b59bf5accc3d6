"""PEFT's folders: a small Llama and an adapter. The judge is PEFT's forward pass on the same damaged folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_json
from torture.fuzz.subject import Subject, Unjudged


@dataclass(frozen=True)
class PeftFolders:
    """`damaged` is a file below the attempt's folder, whose JSON is damaged."""

    name: str
    damaged: str

    def make(self, folder: Path) -> None:
        import torch
        from peft import MissConfig, get_peft_model

        torch.manual_seed(0)
        model = llama()
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, MissConfig(r=4, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "miss_" in name:
                    parameter.normal_(0, 0.02)
        adapted.save_pretrained(folder / "adapter")

    def mutate(self, folder: Path, random: Random) -> str:
        return damage_json(folder / self.damaged, random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return ["merge", str(folder / "adapter"), "--base", str(folder / "base"), "--output", str(folder / "out")]

    def judge(self, folder: Path) -> str | None:
        import torch
        from peft import PeftModel

        tokens = torch.arange(12)[None] % 64
        try:
            base = load(folder / "base")
            trained = PeftModel.from_pretrained(base, str(folder / "adapter"))
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}") from problem
        with torch.no_grad():
            expected = trained.double()(tokens).logits
            found = load(folder / "out").double()(tokens).logits
        distance = float((found - expected).norm() / expected.norm())
        return None if distance < 1e-4 else f"differs by {distance:.2g} from the trained model"


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


SUBJECTS: list[Subject] = [
    PeftFolders("adapter_config.json", "adapter/adapter_config.json"),
    PeftFolders("config.json", "base/config.json"),
]
