"""Merge against `cp -r` and PEFT: wall time and peak memory, as ratios in one run.

    python benchmarks/merge.py --size 6.4 --pairs 5 --peft 2

makes a random Llama-3.2-3B-shaped bfloat16 base of about that many GB in four files (more layers for more
GB), an all-linear and a q,v-only adapter (tile, r = 64), and runs the contestants in turn, each as a whole
process; `sync` counts, and `fossil-export merge` includes its own. `verify` checks what the merge before it
wrote. Prints medians and ratios as Markdown.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import ml_dtypes
import numpy as np

from fossil_export.checkpoints._header import encode_header

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB, RANK, MINI = 3072, 8192, 24, 8, 128, 128256, 64, 64
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().{save}(target)
"""


DTYPES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
}


def make_base(folder: Path, gigabytes: float, dtype: str = "bfloat16", vocabulary: int = VOCAB) -> int:
    """Write the base if it is not there yet; returns its number of layers."""
    short, kind = DTYPES[dtype]
    size = int(np.dtype(kind).itemsize)
    per_layer = size * sum(rows * columns for rows, columns in LINEARS.values())
    layers = max(1, round((gigabytes * 1e9 - size * vocabulary * HIDDEN) / per_layer))
    if (folder / "config.json").exists():
        return layers
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pool = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02).astype(kind)
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, HIDDEN))]
    for layer in range(layers):
        tensors += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in LINEARS.items()]
        tensors += [
            (f"model.layers.{layer}.{name}.weight", (HIDDEN,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    tensors.append(("model.norm.weight", (HIDDEN,)))
    weight_map, parts = {}, 4
    target = sum(int(np.prod(shape)) for _, shape in tensors) / parts
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        if filled > target * len(groups) and len(groups) < parts:
            groups.append([])
        groups[-1].append((name, shape))
        filled += int(np.prod(shape))
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(encode_header([(name, short, shape) for name, shape in group], {"format": "pt"}))
            for index, (name, shape) in enumerate(group):
                weight_map[name] = file
                left, start = int(np.prod(shape)), 7919 * (index + 1)
                while left:
                    chunk = pool[start : start + left]
                    stream.write(chunk.view(np.uint8).data)
                    left -= len(chunk)
                    start = 0
    total = sum(size * int(np.prod(shape)) for _, shape in tensors)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index_text)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    os.sync()
    return layers


def make_adapter(
    folder: Path, base: Path, layers: int, targets: list[str], lora: int | None = None, variant: str = "tile"
) -> None:
    """An adapter of a variant (tile, mini, bat) with random float32 shards, as PEFT saves it, or a LoRA of a rank."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    shards = [
        (f"base_model.model.model.layers.{layer}.{name}.{ending}", shape)
        for layer in range(layers)
        for name, (outputs, inputs) in LINEARS.items()
        for ending, shape in _tensors(outputs, inputs, lora, variant)
        if name.rpartition(".")[2] in targets
    ]
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(encode_header([(name, "F32", shape) for name, shape in shards], {"format": "pt"}))
        for _, shape in shards:
            stream.write((rng.standard_normal(shape, np.float32) * 1e-3).tobytes())
    method = {"peft_type": "MISS", "r": RANK, "init_weights": True, "mini_r": 1}
    if variant != "tile":
        method |= {"init_weights": variant, "mini_r": MINI}
    if lora is not None:
        method = {"peft_type": "LORA", "r": lora, "lora_alpha": 2 * lora, "lora_dropout": 0.0, "fan_in_fan_out": False}
    config = {
        **method,
        "target_modules": targets,
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _tensors(outputs: int, inputs: int, lora: int | None, variant: str) -> list[tuple[str, tuple[int, ...]]]:
    if lora is None:
        shapes = {"tile": (RANK, outputs), "mini": (RANK, MINI), "bat": (outputs // RANK, RANK, RANK)}
        return [("miss_block", shapes[variant])]
    return [("lora_A.weight", (lora, inputs)), ("lora_B.weight", (outputs, lora))]


def peft_merge(save: str, base: str, adapter: str, target: str) -> list[str]:
    """PEFT's own merge as a command; `save` is the method that takes the result to `target`."""
    return [sys.executable, "-c", PEFT_MERGE.format(save=save), base, adapter, target]


def contestants_of(work: Path, base: Path) -> dict[str, Callable[[], tuple[float, int]]]:
    output = str(work / "output")
    tool = [sys.executable, "-m", "fossil_export", "merge"]
    return {
        "cp -r, sync": lambda: common.measure(["cp", "-r", str(base), output], sync=True),
        "fossil-export, all-linear": lambda: common.measure([*tool, str(work / "all"), "--output", output]),
        "fossil-export verify, weights": lambda: common.measure(
            [sys.executable, "-m", "fossil_export", "verify", output, "--level", "weights"]
        ),
        "fossil-export, q,v": lambda: common.measure([*tool, str(work / "qv"), "--output", output]),
        "PEFT, all-linear": lambda: common.measure(
            [sys.executable, "-c", PEFT_MERGE.format(save="save_pretrained"), str(base), str(work / "all"), output],
            sync=True,
        ),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=float, default=6.4, help="of the base, in GB (default 6.4)")
    parser.add_argument("--pairs", type=int, default=5, help="runs of cp and fossil-export (default 5)")
    parser.add_argument("--peft", type=int, default=0, help="runs of PEFT (default 0: it needs twice the base in RAM)")
    parser.add_argument("--work", type=Path, default=common.WORK)
    options = parser.parse_args()
    work: Path = options.work
    base = work / f"base-{options.size:g}"
    layers = make_base(base, options.size)
    make_adapter(work / "all", base, layers, [name.rpartition(".")[2] for name in LINEARS])
    make_adapter(work / "qv", base, layers, ["q_proj", "v_proj"])
    contestants = contestants_of(work, base)
    runs = {name: options.peft if name.startswith("PEFT") else options.pairs for name in contestants}
    results: dict[str, list[tuple[float, int]]] = {}
    for _, name in common.turns(runs):
        if "verify" not in name:  # that reads what the run before it wrote
            shutil.rmtree(work / "output", ignore_errors=True)
        os.sync()
        results.setdefault(name, []).append(contestants[name]())
        common.say(f"{name}: {results[name][-1][0]:.2f} s")
    shutil.rmtree(work / "output", ignore_errors=True)

    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"{size / 1e9:.2f} GB; {common.machine('numpy')}\n")
    print(common.timings(results, "cp -r, sync", "against cp"))


if __name__ == "__main__":
    main()
