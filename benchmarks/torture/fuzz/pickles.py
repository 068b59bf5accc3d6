"""Bases and adapters as PyTorch's pickles. The judge is `torch.load` on the same damaged files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import small
from torture.fuzz.pickle_damage import damage_torch_file
from torture.fuzz.subject import Subject, Unjudged


@dataclass(frozen=True)
class Pickled:
    """A base and an adapter, of which one is `damaged`: a file below the attempt's folder."""

    damaged: str
    zipped: bool

    @property
    def name(self) -> str:
        return f"{Path(self.damaged).name} {'(archive)' if self.zipped else '(old)'}"

    def make(self, folder: Path) -> None:
        import torch

        small.write_config(folder / "base")
        small.write_adapter(folder / "adapter")
        (folder / "adapter" / "adapter_model.safetensors").unlink()
        options: dict[str, Any] = {"_use_new_zipfile_serialization": self.zipped}
        state = small.floats()
        # A tensor that does not lie in its own order, and two in one storage.
        state[f"{small.PREFIX}mlp.up_proj.weight"] = state[f"{small.PREFIX}mlp.up_proj.weight"].T.contiguous().T
        both = torch.cat([state["model.norm.weight"], state[f"{small.PREFIX}input_layernorm.weight"]])
        state["model.norm.weight"], state[f"{small.PREFIX}input_layernorm.weight"] = both[:64], both[64:]
        torch.save(state, folder / "base" / "pytorch_model.bin", **options)
        torch.save(small.lora(), folder / "adapter" / "adapter_model.bin", **options)

    def mutate(self, folder: Path, random: Random) -> str:
        return damage_torch_file(folder / self.damaged, random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return ["merge", str(folder / "adapter"), "--base", str(folder / "base"), "--output", str(folder / "out")]

    def judge(self, folder: Path) -> str | None:
        base = loaded(folder / "base" / "pytorch_model.bin")
        adapter = loaded(folder / "adapter" / "adapter_model.bin")
        try:
            updates = small.updates(adapter)
        except Exception as problem:
            raise Unjudged(f"the adapter's tensors: {problem!r}") from problem
        return small.merged_problem(folder / "out", small.as_they_are(base), updates)


def loaded(path: Path) -> dict[str, Any]:
    """What PyTorch reads. Raises Unjudged if it refuses."""
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): value.detach() for name, value in found.items()}
    except Exception as problem:
        raise Unjudged(f"torch.load: {type(problem).__name__}: {str(problem)[:300]}") from problem


SUBJECTS: list[Subject] = [
    Pickled(damaged, zipped)
    for damaged in ("base/pytorch_model.bin", "adapter/adapter_model.bin")
    for zipped in (True, False)
]
