"""Other places that inputs lie in: single files, shards of an adapter, checkpoints in the folder of a run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz import scene
from torture.fuzz.adapters import PeftFolders
from torture.fuzz.mutations import damage_file, damage_json
from torture.fuzz.safetensors_files import damage_safetensors
from torture.fuzz.subject import Subject

WEIGHTS = "adapter_model.safetensors"
STATE = {"best_model_checkpoint": "run/checkpoint-10", "global_step": 20, "best_metric": 0.5, "log_history": [{}]}
WAYS = ("empty", "folder", "gone", "damaged", "damaged", "damaged")


def damage_or_misplace(path: Path, random: Random) -> str:
    """Damage to a file, or no file in its place."""
    way = random.choice(WAYS)
    if way == "damaged" and path.suffix == ".safetensors":
        return damage_safetensors(path, random)
    if way == "damaged":
        return damage_json(path, random) if path.suffix == ".json" else damage_file(path, random)
    if way == "empty":
        os.truncate(path, 0)
        return f"{path.name}: empty"
    path.unlink()
    if way == "folder":
        path.mkdir()
    return f"{path.name}: {way}"


@dataclass(frozen=True)
class SingleFiles(PeftFolders):
    """Base and adapter are named by their files."""

    def mutate(self, folder: Path, random: Random) -> str:
        kind = self.place_adapter(folder, random)
        return f"{kind}: {damage_or_misplace(folder / random.choice(self.damaged), random)}"

    def command(self, folder: Path, random: Random) -> list[str]:
        base = str(folder / "base" / random.choice(("model.safetensors", "")))
        adapter = str(folder / "adapter" / random.choice((WEIGHTS, "")))
        more = random.choice(([], ["--dtype", "bfloat16"], ["--max-shard-size", "20KB"], ["--into", "original"]))
        return ["merge", adapter, "--base", base, "--output", str(folder / "out"), *more]

    def judge(self, folder: Path) -> str | None:
        cast = any(value.element_size() == 2 for value in scene.tensors(folder / "out").values())
        return scene.judge_merge(folder, tolerance=scene.TOLERANCE["bfloat16" if cast else "float32"])


@dataclass(frozen=True)
class Shards(PeftFolders):
    """An adapter in two files with an index, which PEFT does not read: the judge gets them in one."""

    def mutate(self, folder: Path, random: Random) -> str:
        from safetensors.torch import load_file, save_file

        kind = self.place_adapter(folder, random)
        adapter = folder / "adapter"
        state = load_file(adapter / WEIGHTS)
        (adapter / WEIGHTS).unlink()
        half = sorted(state)[: len(state) // 2]
        files = {name: f"adapter_model-0000{1 if name in half else 2}-of-00002.safetensors" for name in state}
        for file in set(files.values()):
            save_file({name: state[name] for name in state if files[name] == file}, adapter / file, {"format": "pt"})
        index = adapter / f"{WEIGHTS}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
        damaged = random.choice((index, index, *(adapter / file for file in sorted(set(files.values())))))
        return f"{kind}: {damage_or_misplace(damaged, random)}"

    def judge(self, folder: Path) -> str | None:
        from safetensors.torch import save_file

        if not (folder / "out").exists():
            return None  # a plan
        state = scene.tensors(folder / "adapter")
        for path in (folder / "adapter").glob("*.safetensors*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        save_file(state, folder / "adapter" / WEIGHTS, {"format": "pt"})
        return scene.judge_merge(folder)


@dataclass(frozen=True)
class Runs(PeftFolders):
    """The folder of a run with two checkpoints; the judge takes the one that the command said it takes, or names."""

    def mutate(self, folder: Path, random: Random) -> str:
        self.place_adapter(folder, random)
        run = folder / "run"
        for number, kind in ((10, "lora"), (20, "tile")):
            checkpoint = run / f"checkpoint-{number}"
            shutil.copytree(folder.parent / "kinds" / kind, checkpoint)
            (checkpoint / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": number}))
        shutil.rmtree(folder / "adapter")
        number = random.choice((10, 20))
        name = random.choice(("trainer_state.json", "trainer_state.json", scene.CONFIG, WEIGHTS))
        (folder / "asked").write_text(random.choice(("run", *["run/checkpoint-10"] * 2, *["run/checkpoint-20"] * 2)))
        return f"checkpoint-{number}: {damage_or_misplace(run / f'checkpoint-{number}' / name, random)}"

    def place_adapter(self, folder: Path, random: Random) -> str:
        for kind in self.kinds:
            made = folder.parent / "kinds" / kind
            if not made.is_dir():
                scene.make_adapter(made, kind, folder / "sound" / "base")
        shutil.copytree(folder.parent / "kinds" / self.kinds[0], folder / "adapter")
        return self.kinds[0]

    def command(self, folder: Path, random: Random) -> list[str]:
        given = folder / (folder / "asked").read_text()
        return ["merge", str(given), "--base", str(folder / "base"), "--output", str(folder / "out")]

    def judge(self, folder: Path) -> str | None:
        record = json.loads((folder / "out" / "fossil_export.json").read_text())
        taken = "tile" if record["adapter"]["peft_type"] == "MISS" else "lora"
        number = 20 if taken == "tile" else 10
        asked = (folder / "asked").read_text()
        if asked != "run" and asked != f"run/checkpoint-{number}":
            return f"checkpoint-{number} was taken, {asked} was asked for"
        shutil.copytree(folder / "run" / f"checkpoint-{number}", folder / "adapter")
        shutil.copytree(folder.parent / "kinds" / taken, folder / "sound" / "adapter")
        return scene.judge_merge(folder)


SUBJECTS: list[Subject] = [
    SingleFiles(
        "single files",
        ("base/model.safetensors", "base/config.json", f"adapter/{WEIGHTS}", f"adapter/{scene.CONFIG}"),
        ("tile", "lora"),
    ),
    Shards("shards of an adapter", (), ("tile", "lora", "lora of a pattern")),
    Runs("checkpoints of a run", (), ("lora", "tile")),
]
