"""What is killed: commands, and the inputs they have. Some megabytes in several files, so that kills fall between."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ADAPTER, BASE = "ada/adapter", "ada/base"
"""On the loopback Hub."""

TAKEN_UP = "finished files were taken up"
"""Behind a number, in what a row tells of an attempt."""


@dataclass(frozen=True)
class Case:
    """A command; `{inputs}` and `{run}` stand for folders, `{repo}` for a new repository. `output` is what it makes in
    `run`; None for one that publishes. With `replaces` an older result of the same kind lies there."""

    name: str
    command: str
    output: str | None = "out"
    replaces: bool = False

    def arguments(self, inputs: Path, run: Path, repo: str) -> list[str]:
        return [part.format(inputs=inputs, run=run, repo=repo) for part in self.command.split()]


_GRAPH = "onnx {inputs}/graph/adapter --base {inputs}/graph/base --onnx {inputs}/graph/model.onnx -o {run}/out --mode "
_CONVERT = " --base {inputs}/base --to "

CASES = (
    Case("merge", "merge {inputs}/miss --base {inputs}/base -o {run}/out"),
    Case("merge --overwrite", "merge {inputs}/miss --base {inputs}/base -o {run}/out --overwrite", replaces=True),
    Case("convert --to lora", "convert {inputs}/miss -o {run}/out" + _CONVERT + "lora"),
    Case("convert --to gguf-lora", "convert {inputs}/lora -o {run}/out.gguf" + _CONVERT + "gguf-lora", "out.gguf"),
    Case("onnx --mode fused", _GRAPH + "fused"),
    Case("onnx --mode tiled", _GRAPH + "tiled"),
    Case("onnx --mode swappable", _GRAPH + "swappable"),
    Case("merge --stream", f"merge {ADAPTER} --push-to-hub {{repo}} --stream --cache-dir {{run}}/cache", None),
)


def make(folder: Path) -> None:
    """Base, adapters, and a graph with an adapter of its own, below a new `folder`."""
    import torch
    from graphs import make_case, make_graph  # type: ignore[import-not-found]
    from peft import LoraConfig, MissConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = folder / "base"
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size="2MB")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    targets = ["q_proj", "v_proj", "down_proj"]
    for name, settings in {
        "miss": MissConfig(r=64, target_modules=targets),
        "older": MissConfig(r=8, target_modules=["o_proj"]),
        "lora": LoraConfig(r=64, target_modules=targets),
    }.items():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.02)
        adapted.save_pretrained(folder / name)
        if name == "miss":
            (folder / "hub").mkdir()
            shutil.copytree(folder / name, folder / "hub" / "adapter")
            place = folder / "hub" / "adapter" / "adapter_config.json"
            place.write_text(place.read_text().replace(str(base), BASE))
    widths = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    (folder / "graph").mkdir()
    case = make_case(folder / "graph", inputs=256, outputs=widths, rank=32, depth=12)
    make_graph(case, folder / "graph" / "model.onnx")
