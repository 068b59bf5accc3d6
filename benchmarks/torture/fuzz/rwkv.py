"""RWKV-PEFT's files: a base and an adapter of one `.pth` file each. The judge is `torch.load` and the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import small
from torture.fuzz.pickle_damage import damage_torch_file
from torture.fuzz.pickles import loaded
from torture.fuzz.subject import Subject, Unjudged
from torture.fuzz.tensor_damage import damaged

WIDTH, HIDDEN, RANK = 32, 48, 8


@dataclass(frozen=True)
class Rwkv:
    """`damaged` is the file that is; its `place` is "tensors" or "file"."""

    damaged: str
    place: str

    @property
    def name(self) -> str:
        return f"RWKV {self.damaged}: {self.place}"

    def make(self, folder: Path) -> None:
        import torch

        torch.manual_seed(3)
        base = {"emb.weight": torch.randn(20, WIDTH)}
        for name in ("receptance", "key", "value", "output"):
            base[f"blocks.0.att.{name}.weight"] = torch.randn(WIDTH, WIDTH)
        base["blocks.0.att.x_r"] = torch.randn(1, 1, WIDTH)
        base["blocks.0.ffn.key.weight"] = torch.randn(HIDDEN, WIDTH)
        base["blocks.0.ffn.value.weight"] = torch.randn(WIDTH, HIDDEN)
        base["head.weight"] = torch.randn(20, WIDTH)
        base = {name: value.bfloat16() for name, value in base.items()}
        adapter = {}
        for name, weight in base.items():
            if ".att." in name and weight.ndim == 2:
                adapter[name.replace(".weight", ".disha")] = 0.1 * torch.randn(RANK, len(weight))
            if ".ffn." in name:
                adapter[name.replace(".weight", ".disha")] = 0.1 * torch.randn(len(weight) // 16, 16, 16)
        (folder / "given").mkdir(parents=True)
        torch.save(base, folder / "given" / "base.pth")
        torch.save(adapter, folder / "given" / "adapter.pth")

    def mutate(self, folder: Path, random: Random) -> str:
        import torch

        path = folder / "given" / self.damaged
        if self.place == "file":
            return damage_torch_file(path, random)
        state = torch.load(path, weights_only=True)
        how = damaged(state, random.choice(sorted(state)), random)
        torch.save(state, path, _use_new_zipfile_serialization=random.random() < 0.5)
        return how

    def command(self, folder: Path, random: Random) -> list[str]:
        base, adapter = str(folder / "given" / "base.pth"), str(folder / "given" / "adapter.pth")
        return ["merge", adapter, "--base", base, "--output", str(folder / "out")]

    def judge(self, folder: Path) -> str | None:
        base, adapter = loaded(folder / "given" / "base.pth"), loaded(folder / "given" / "adapter.pth")
        weights, updates = small.as_they_are(base), {}
        for name, shard in adapter.items():
            weight = f"{name.rpartition('.')[0]}.weight"
            try:
                updates[weight] = _update(weights[weight][0], shard.double())
            except Exception as problem:
                raise Unjudged(f"{name}: {problem!r}"[:300]) from problem
        return small.merged_problem(folder / "out", weights, updates)


def _update(weight: Any, shard: Any) -> Any:
    """tile: D[j mod r, o] of a shard (r, out). bat: W[b, a] B[b] + B[b] of a shard (out / r, r, r)."""
    import torch

    if shard.ndim == 2:
        return shard[torch.arange(weight.shape[1]) % len(shard)].T
    rank = shard.shape[1]
    blocks = weight.reshape(weight.shape[0] // rank, rank, weight.shape[1] // rank, rank).transpose(1, 2)
    return (blocks @ shard[:, None] + shard[:, None]).transpose(1, 2).reshape(weight.shape)


SUBJECTS: list[Subject] = [Rwkv(file, place) for file in ("base.pth", "adapter.pth") for place in ("tensors", "file")]
