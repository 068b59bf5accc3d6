"""PEFT's folders: a small Llama, adapters of every method, alone and several. The judge is PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz import scene
from torture.fuzz.mutations import damage_file, damage_json
from torture.fuzz.safetensors_files import damage_safetensors
from torture.fuzz.subject import Subject, Unjudged

COMPANIONS = {
    "generation_config.json": {"eos_token_id": 2, "do_sample": True, "_from_model_config": True},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    "special_tokens_map.json": {"eos_token": "</s>"},
    "tokenizer.json": {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 2}, "unk_token": "a"},
    },
    "chat_template.jinja": {},
}


@dataclass(frozen=True)
class PeftFolders:
    """What is `damaged` lies below the attempt's folder; the adapter is one of `kinds`, or of all."""

    name: str
    damaged: tuple[str, ...]
    kinds: tuple[str, ...] = ("tile",)
    verb: str = "merge"
    shards: str = "5GB"

    def make(self, folder: Path) -> None:
        scene.make_base(folder / "base", max_shard_size=self.shards)
        for name, content in COMPANIONS.items():
            if not (folder / "base" / name).exists():
                (folder / "base" / name).write_text(json.dumps(content))
        shutil.copytree(folder / "base", folder / "sound" / "base")

    def mutate(self, folder: Path, random: Random) -> str:
        kind = self.place_adapter(folder, random)
        damaged = folder / random.choice(self.damaged)
        if damaged.suffix == ".safetensors":
            return f"{kind}: {damage_safetensors(damaged, random)}"
        if damaged.suffix == ".json":
            return f"{kind}: {damage_json(damaged, random)}"
        return f"{kind}: {damage_file(damaged, random)}"

    def place_adapter(self, folder: Path, random: Random) -> str:
        """One of a random kind, made once for all subjects."""
        kind = random.choice(self.kinds or tuple(scene.kinds()))
        made = folder.parent / "kinds" / kind
        if not made.is_dir():
            scene.make_adapter(made, kind, folder / "sound" / "base")
        for at in ("adapter", "sound/adapter"):
            shutil.copytree(made, folder / at)
        return kind

    def command(self, folder: Path, random: Random) -> list[str]:
        adapter, base, out = (str(folder / name) for name in ("adapter", "base", "out"))
        if self.verb == "inspect":
            return ["inspect", adapter, *random.choice(([], ["--json"]))]
        if self.verb == "convert":
            return ["convert", adapter, "--to", "lora", "--base", base, "--output", out]
        more = random.choice(([], [], [], ["--json"], ["--max-shard-size", "10KB"], ["--dry-run"], ["--hash"]))
        return ["merge", adapter, "--base", base, "--output", out, *more]

    def judge(self, folder: Path) -> str | None:
        if self.verb == "inspect":
            return None  # nothing was made of it; what is printed is looked at by the harness
        if not (folder / "out").exists():
            return None  # a plan
        if self.verb == "convert":
            return self._converted(folder)
        return scene.judge_merge(folder)

    def _converted(self, folder: Path) -> str | None:
        try:
            expected = scene.answers(scene.adapted(folder / "base", [(folder / "adapter", 1.0)]))
        except Unjudged:
            # PEFT refuses the damaged config; the sound one tells what the tensors mean.
            shutil.copyfile(folder / "sound" / "adapter" / scene.CONFIG, folder / "adapter" / scene.CONFIG)
            written = json.loads((folder / "out" / scene.CONFIG).read_bytes())
            (folder / "out" / scene.CONFIG).write_text(json.dumps(written | {"task_type": None}))
            expected = scene.answers(scene.adapted(folder / "base", [(folder / "adapter", 1.0)]))
        found = scene.answers(scene.adapted(folder / "base", [(folder / "out", 1.0)]))
        return scene.difference(found, expected, 1e-4)


@dataclass(frozen=True)
class Several:
    """Several adapters with weights, one of them damaged."""

    name: str = "several adapters"

    def make(self, folder: Path) -> None:
        scene.make_base(folder / "base")
        for number, kind in enumerate(("lora", "lora of a pattern", "tile")):
            scene.make_adapter(folder / f"a{number}", kind, folder / "base", number)
        shutil.copytree(folder, folder.with_name("sound-several"))
        shutil.move(folder.with_name("sound-several"), folder / "sound")

    def mutate(self, folder: Path, random: Random) -> str:
        one = folder / f"a{random.randrange(2)}"
        if random.random() < 0.5:
            return f"{one.name}: {damage_json(one / scene.CONFIG, random)}"
        return f"{one.name}: {damage_safetensors(one / 'adapter_model.safetensors', random)}"

    def command(self, folder: Path, random: Random) -> list[str]:
        return [
            *("merge", f"{folder / 'a0'}=0.5", "--adapter", f"{folder / 'a1'}=-1.25"),
            *("--base", str(folder / "base"), "--output", str(folder / "out")),
        ]

    def judge(self, folder: Path) -> str | None:
        return scene.judge_merge(folder, [("a0", 0.5), ("a1", -1.25)])


_JSON, _TENSORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"

SUBJECTS: list[Subject] = [
    PeftFolders("adapter_config.json", (_JSON,)),
    PeftFolders("adapter_config.json, all methods", (_JSON,), ()),
    PeftFolders("adapter tensors, all methods", (_TENSORS,), ()),
    PeftFolders("config.json", ("base/config.json",)),
    PeftFolders("base tensors", ("base/model.safetensors",), ("tile", "lora", "dora")),
    PeftFolders("index of a base", ("base/model.safetensors.index.json",), shards="20KB"),
    PeftFolders("files beside a base", tuple(f"base/{name}" for name in COMPANIONS)),
    PeftFolders("inspect", (_JSON, _TENSORS), (), "inspect"),
    PeftFolders(
        "convert to LoRA", (_JSON, _TENSORS), ("tile", "lora", "adalora", "dora", "lora with a head"), "convert"
    ),
    Several(),
]
