"""What the commands wrote, damaged, and given to `verify` and `push --dry-run`. Whoever looks must not say that it is
sound; the judges are transformers, PEFT and the bytes as they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz.mutations import damage_file, damage_json
from torture.fuzz.scene import llama, load
from torture.fuzz.subject import Subject, Unjudged


def make_artifacts(folder: Path) -> None:
    """A base, an adapter, a merged model, a LoRA and a GGUF adapter; the sound ones a second time."""
    import torch
    from peft import MissConfig, get_peft_model

    from fossil_export import convert, merge, verify

    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base")
    make_tokenizer(folder / "base")
    adapted = get_peft_model(model, MissConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "miss_" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(folder / "adapter")
    base = folder / "base"
    merge(folder / "adapter", folder / "merged", base=base)
    convert(folder / "adapter", folder / "lora", to="lora", base=base)
    convert(folder / "adapter", folder / "adapter.gguf", to="gguf-lora", base=base)
    for name in ("merged", "lora"):
        verify(folder / name, base=base, adapter=folder / "adapter", level="weights")
        shutil.copytree(folder / name, folder / f"sound-{name}")


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"{chr(97 + at % 26)}": 3 + at for at in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)


def damage_any(path: Path, random: Random) -> str:
    if path.suffix == ".json":
        return damage_json(path, random)
    if path.suffix == ".safetensors" and random.random() < 0.6:
        return _damage_values(path, random)
    return damage_file(path, random)


def _damage_values(path: Path, random: Random) -> str:
    """A tensor with another value, gone, of another shape or type, or under another name."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    name = random.choice(sorted(state))
    way = random.choice(("value", "value", "gone", "shape", "type", "name", "swap"))
    if way == "value":
        flat = state[name].view(-1)
        flat[random.randrange(len(flat))] = random.choice((0.0, 1.0, -1e-3, float("nan"), float("inf"), 1e30))
    elif way == "gone":
        del state[name]
    elif way == "shape":
        state[name] = state[name].reshape(-1).clone()
    elif way == "type":
        state[name] = state[name].to(random.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32)))
    elif way == "name":
        state[random.choice((f"{name}x", "", "\x1b[2J", name.replace("0", "7")))] = state.pop(name)
    else:
        other = random.choice([one for one in sorted(state) if state[one].shape == state[name].shape])
        state[name], state[other] = state[other], state[name]
    save_file(state, path, metadata)
    return f"{path.name}: {name}: {way}"


@dataclass(frozen=True)
class Checked:
    """`verify` of a damaged folder."""

    kind: str
    level: str

    @property
    def name(self) -> str:
        return f"verify, {self.kind}, {self.level}"

    def make(self, folder: Path) -> None:
        make_artifacts(folder)

    def mutate(self, folder: Path, random: Random) -> str:
        files = sorted(
            path for path in (folder / self.kind).iterdir() if path.suffix in (".json", ".safetensors", ".jinja")
        )
        how = damage_any(random.choice(files), random)
        (folder / "how").write_text(how.encode(errors="replace").decode())
        return how

    def command(self, folder: Path, random: Random) -> list[str]:
        named = random.choice(([], ["--base", str(folder / "base"), "--adapter", str(folder / "adapter")]))
        prompts = folder / "prompts"
        prompts.write_text("abc def\nxyz\n")
        return ["verify", str(folder / self.kind), "--level", self.level, "--prompts", str(prompts), *named]

    def judge(self, folder: Path) -> str | None:
        import torch
        from peft import PeftModel

        def answers(name: str) -> Any:
            with torch.no_grad():
                if self.kind == "merged":
                    return load(folder / name)(tokens).logits
                return PeftModel.from_pretrained(load(folder / "base"), str(folder / name))(tokens).logits

        tokens = torch.arange(12)[None] % 64
        expected = answers(f"sound-{self.kind}")
        try:
            found = answers(self.kind)
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:300]) from problem
        distance = float((found - expected).norm() / expected.norm())
        bound = 2e-5 if self.level == "forward" else 1e-5  # the floor of what verify allows, twice
        return None if distance < bound else f"said to be what was trained, and is {distance:.2g} off"


@dataclass(frozen=True)
class Pushed:
    """`push --dry-run` with no Hub in reach, of a folder with a damaged record, certificate or config."""

    kind: str

    @property
    def name(self) -> str:
        return f"push --dry-run, {self.kind}"

    def make(self, folder: Path) -> None:
        make_artifacts(folder)

    def mutate(self, folder: Path, random: Random) -> str:
        path = folder / self.kind
        if path.is_dir():
            names = (
                "fossil_export.json",
                "fossil_export.json",
                "fossil_parity.json",
                "config.json",
                "adapter_config.json",
            )
            path = random.choice([path / name for name in names if (path / name).is_file()])
        return damage_any(path, random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return ["push", "--dry-run", str(folder / self.kind), "ada/model", *random.choice(([], ["--json"]))]

    def judge(self, folder: Path) -> str | None:
        printed = (folder.parent / "stdout").read_text()
        if printed.startswith("{"):
            json.loads(printed)
        return None  # a plan: nothing was made


SUBJECTS: list[Subject] = [
    *(Checked(kind, level) for kind in ("merged", "lora") for level in ("weights", "forward")),
    *(Pushed(kind) for kind in ("merged", "lora", "adapter.gguf")),
]
