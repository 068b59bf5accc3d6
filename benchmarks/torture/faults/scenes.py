"""The commands that are attempted, on models small enough to write in a moment."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torture.fuzz.scene import llama


@dataclass(frozen=True)
class Command:
    """`words` have {sound} for the folder of inputs and {here} for the attempt's; `prepared` are folders of the inputs
    that are copied into the attempt's first, by the names they get there."""

    name: str
    words: tuple[str, ...]
    prepared: tuple[tuple[str, str], ...] = ()

    @property
    def writes(self) -> bool:
        return "-o" in self.words or "--report" in self.words

    def arguments(self, sound: Path, here: Path) -> list[str]:
        return [word.format(sound=sound, here=here) for word in self.words]

    def prepare(self, sound: Path, here: Path) -> None:
        """Make the attempt's folder anew."""
        shutil.rmtree(here, ignore_errors=True)
        (here / "tmp").mkdir(parents=True)
        self.copy(sound, here)

    def copy(self, sound: Path, here: Path) -> None:
        for source, name in self.prepared:
            copy = shutil.copytree if (sound / source).is_dir() else shutil.copyfile
            copy(sound / source, here / name)


_MERGE = ("merge", "{sound}/adapter", "--base", "{sound}/base", "-o", "{here}/out", "--json")
_GRAPH = (
    "onnx",
    "{sound}/graphs/adapter",
    "--base",
    "{sound}/graphs/base",
    "--onnx",
    "{sound}/graphs/plain/model.onnx",
)
_OUT = ("-o", "{here}/out", "--json")

COMMANDS = (
    Command("merge", _MERGE),
    Command("merge over", (*_MERGE, "--overwrite"), (("old", "out"),)),
    Command("merge float16", (*_MERGE, "--dtype", "float16", "--max-shard-size", "20KB", "--hash")),
    Command("convert lora", ("convert", "{sound}/adapter", "--to", "lora", "--base", "{sound}/base", *_OUT)),
    Command(
        "convert gguf",
        (
            "convert",
            "{sound}/adapter",
            "--to",
            "gguf-lora",
            "--base",
            "{sound}/base",
            "-o",
            "{here}/out.gguf",
            "--json",
        ),
    ),
    Command(
        "convert gguf over",
        (
            *("convert", "{sound}/adapter", "--to", "gguf-lora", "--base", "{sound}/base", "-o", "{here}/out.gguf"),
            *("--overwrite", "--json"),
        ),
        (("old.gguf", "out.gguf"),),
    ),
    Command("onnx swappable", (*_GRAPH, "--mode", "swappable", *_OUT)),
    Command("onnx fused", (*_GRAPH, "--mode", "fused", "--copy-data", *_OUT)),
    Command("onnx merged", (*_GRAPH, "--mode", "merged", *_OUT)),
    Command(
        "convert onnx",
        (
            *("convert", "{sound}/graphs/adapter", "--base", "{sound}/graphs/base", "--to", "onnx-adapter"),
            *("--for", "{sound}/swappable", "-o", "{here}/out.onnx_adapter", "--json"),
        ),
    ),
    Command(
        "verify",
        ("verify", "{here}/merged", "--level", "weights", "--report", "{here}/report.html", "--json"),
        (("merged", "merged"),),
    ),
    Command("inspect", ("inspect", "{sound}/adapter", "--base", "{sound}/base", "--json")),
)


def make(sound: Path) -> None:
    """The inputs of all commands."""
    import sys

    import torch
    from peft import MissConfig, get_peft_model

    from fossil_export import convert, export_onnx, merge

    sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
    from graphs import make_case, make_graph  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(sound / "base", max_shard_size="30KB")
    (sound / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (sound / "base" / "LICENSE").write_text("Apache-2.0")
    for name in ("adapter", "other"):
        adapted = get_peft_model(llama(), MissConfig(r=4, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for part, parameter in adapted.named_parameters():
                if "miss_" in part:
                    parameter.normal_(0, 0.02)
        adapted.save_pretrained(sound / name)
    merge(sound / "other", sound / "old", base=sound / "base")
    merge(sound / "adapter", sound / "merged", base=sound / "base")
    convert(sound / "other", sound / "old.gguf", to="gguf-lora", base=sound / "base")
    (sound / "graphs").mkdir()
    case = make_case(sound / "graphs")
    graph = make_graph(case, sound / "graphs" / "plain" / "model.onnx")
    export_onnx(case.adapter, sound / "swappable", base=case.base, mode="swappable", onnx=graph)
