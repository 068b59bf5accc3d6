"""Folders of mlx-lm: what its layers compute, W + scale · (A B)ᵀ, written down with NumPy, is the judge."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz import scene
from torture.fuzz.mutations import damage_json
from torture.fuzz.safetensors_files import damage_safetensors
from torture.fuzz.subject import Subject, Unjudged

MODULES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}


@dataclass(frozen=True)
class Mlx:
    name: str = "MLX adapter"

    def make(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        scene.make_base(folder / "base")
        (folder / "adapter").mkdir()
        generator = torch.Generator().manual_seed(0)
        found = {}
        for module, (outputs, inputs) in MODULES.items():
            found[f"{module}.lora_a"] = torch.randn(inputs, 4, generator=generator) * 0.05
            found[f"{module}.lora_b"] = torch.randn(4, outputs, generator=generator) * 0.05
        save_file(found, folder / "adapter" / "adapters.safetensors", {"format": "mlx"})
        config = {
            "model": "base", "train": True, "fine_tune_type": "lora", "num_layers": 2, "iters": 100, "seed": 0,
            "optimizer": "adam", "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.0},
        }  # fmt: skip
        (folder / "adapter" / scene.CONFIG).write_text(json.dumps(config))
        shutil.copytree(folder / "adapter", folder / "sound")

    def mutate(self, folder: Path, random: Random) -> str:
        if random.random() < 0.5:
            return damage_json(folder / "adapter" / scene.CONFIG, random)
        return damage_safetensors(folder / "adapter" / "adapters.safetensors", random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return [
            *("merge", str(folder / "adapter"), "--base", str(folder / "base")),
            *("--output", str(folder / "out")),
        ]

    def judge(self, folder: Path) -> str | None:
        expected = {name: value.double() for name, value in scene.tensors(folder / "base").items()}
        try:
            config = json.loads((folder / "adapter" / scene.CONFIG).read_bytes())
            settings = config["lora_parameters"]
            scale = float(settings["scale"]) if "scale" in settings else settings["alpha"] / settings["rank"]
            adapter = {name: value.double() for name, value in scene.tensors(folder / "adapter").items()}
            for name in [name for name in adapter if name.endswith(".lora_a")]:
                module = name.removesuffix(".lora_a")
                update = (adapter[name] @ adapter[f"{module}.lora_b"]).T
                expected[f"{module}.weight"] += scale * update
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:500]) from problem
        return scene.same_weights(scene.tensors(folder / "out"), expected, 1e-5)


SUBJECTS: list[Subject] = [Mlx()]
