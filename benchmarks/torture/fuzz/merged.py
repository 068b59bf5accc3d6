"""Merged folders, damaged after the merge: `verify` must never call one right whose tensors are others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz import scene
from torture.fuzz.mutations import damage_json
from torture.fuzz.safetensors_files import damage_safetensors
from torture.fuzz.subject import Subject


@dataclass(frozen=True)
class Merged:
    """`damaged` lies in the merged folder."""

    name: str
    damaged: tuple[str, ...]

    def make(self, folder: Path) -> None:
        from fossil_export import merge

        scene.make_base(folder / "base")
        scene.make_adapter(folder / "adapter", "tile", folder / "base")
        merge(folder / "adapter", folder / "merged", base=folder / "base")
        shutil.copytree(folder / "merged", folder / "sound")

    def mutate(self, folder: Path, random: Random) -> str:
        path = folder / "merged" / random.choice(self.damaged)
        return damage_safetensors(path, random) if path.suffix == ".safetensors" else damage_json(path, random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return [
            *("verify", str(folder / "merged"), "--base", str(folder / "base"), "--adapter", str(folder / "adapter")),
            *("--level", "weights", *random.choice(([], ["--json"]))),
        ]

    def judge(self, folder: Path) -> str | None:
        """It said that all is well: then every tensor must be as it was, and what the config makes of it."""
        found, sound = (scene.tensors(folder / name) for name in ("merged", "sound"))
        if found.keys() != sound.keys():
            return f"has {sorted(found.keys() ^ sound.keys())[:3]} more or less"
        for name, value in sound.items():
            other = found[name]
            if other.shape != value.shape or other.dtype != value.dtype:
                return f"{name} is {other.dtype} {list(other.shape)}"
            if problem := scene.difference(other.double(), value.double(), 1e-5):
                return f"{name} {problem}"
        if "config.json" in self.damaged:
            return self._config(folder)
        return None

    def _config(self, folder: Path) -> str | None:
        """A config that makes another model of the same tensors."""
        found, sound = (json.loads((folder / name / "config.json").read_bytes()) for name in ("merged", "sound"))
        if found == sound:
            return None
        try:
            answers = scene.answers(scene.load(folder / "merged"))
        except Exception as problem:
            return f"does not load: {type(problem).__name__}: {problem}"[:300]
        return scene.difference(answers, scene.answers(scene.load(folder / "sound")), 1e-6)


SUBJECTS: list[Subject] = [
    Merged("verify: merged tensors", ("model.safetensors",)),
    Merged("verify: merged config", ("config.json",)),
]
