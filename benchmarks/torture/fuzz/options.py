"""Options of the commands with odd values, on sound inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click

from torture.fuzz import scene
from torture.fuzz.subject import Subject, Unjudged

ODD = (
    *("", " ", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 5000, "0x10", "1_0", "٣", "1e-320"),
    *(
        "auto",
        "float32",
        "bfloat16",
        "float16",
        "fp8",
        "nf4",
        "int8",
        "unquantized",
        "cpu",
        "cuda:99",
        "meta",
        "mps:-1",
    ),
    *("10KB", "1B", "0GB", "-5GB", "5 GB", "1e3KB", "5gb", "5GiB", "9" * 400 + "GB", "GB", "a", "a,b", ",,", "(a+)+$"),
    *("\x1b[2J", "\udcff", "\u202e", "é", "\n", "a\nb", "user/repo", "user/repo@x", "hf://", "hf://a", "https://x/y"),
    *("~", "~nobody/x", "..", "/dev/null", "/dev/full", "/proc/self/mem", "x" * 5000, "--json", "-", "=", "a=b", "=1"),
)
PLACES = {"output": ".", "report": "reports", "cache_dir": "reports"}  # written only below the attempt's folder
LEFT_OUT = {"debug", "help", "version", "push_to_hub", "stream"}  # the Hub's


@dataclass(frozen=True)
class Odd:
    """`most` odd options are drawn at a time."""

    verb: str
    most: int = 2

    @property
    def name(self) -> str:
        return f"options of {self.verb}"

    def make(self, folder: Path) -> None:
        scene.make_base(folder / "base")
        scene.make_adapter(folder / "adapter", "lora", folder / "base")
        if self.verb == "verify":
            from fossil_export import merge

            merge(folder / "adapter", folder / "merged", base=folder / "base")

    def mutate(self, folder: Path, random: Random) -> str:
        return ""

    def command(self, folder: Path, random: Random) -> list[str]:
        from fossil_export.cli import main

        command: click.Command = main.commands[self.verb]
        options = [one for one in command.params if isinstance(one, click.Option) and one.name not in LEFT_OUT]
        base, out = ["--base", str(folder / "base")], ["--output", str(folder / "out")]
        given = {
            "merge": [str(folder / "adapter"), *base, *out],
            "inspect": [str(folder / "adapter")],
            "verify": [str(folder / "merged"), *base, "--adapter", str(folder / "adapter"), "--level", "weights"],
            "convert": [str(folder / "adapter"), *base, *out, "--to", random.choice(("lora", "gguf", "miss", "onnx"))],
        }[self.verb]
        if random.random() < 0.15:
            given[0] = random.choice(ODD)
        for option in random.sample(options, random.randint(1, self.most)):
            given += self._odd(option, folder, random)
        (folder / "asked").write_text(json.dumps(given))
        (folder / "reports").mkdir()
        return [self.verb, *given]

    def _odd(self, option: click.Option, folder: Path, random: Random) -> list[str]:
        name = random.choice([*option.opts, *option.secondary_opts])
        if option.is_flag:
            return [name]
        values: tuple[Any, ...] = ODD
        if isinstance(option.type, click.Choice) and random.random() < 0.8:
            values = tuple(option.type.choices)
        value = str(random.choice(values))
        if option.name == "prompts" and random.random() < 0.5:
            (folder / "prompts").write_bytes(random.choice((b"", b"\xff\xfe", b"a" * 10**6, b"\0", b"\n\n", b"hello")))
            value = str(folder / "prompts")
        return [name, f"{folder}/{PLACES[option.name]}/{value}" if option.name in PLACES else value]

    def judge(self, folder: Path) -> str | None:
        if self.verb != "merge" or not (folder / "out" / "config.json").is_file():
            return None
        asked = json.loads((folder / "asked").read_text())
        if "--trained-on" in asked or "--adapter" in asked:
            raise Unjudged("another base was seen")
        kinds = {str(value.dtype).removeprefix("torch.") for value in scene.tensors(folder / "out").values()}
        return scene.judge_merge(folder, tolerance=max(scene.TOLERANCE.get(kind, 1e-4) for kind in kinds))


SUBJECTS: list[Subject] = [Odd("merge"), Odd("inspect"), Odd("verify"), Odd("convert")]
