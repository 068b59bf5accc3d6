"""The README's and the docs' blocks of commands and code, run in order, as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import smollm2
import torch
from conftest import edit_json, make_adapter
from loopback import LoopbackHub, environment
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOKEN = "hf_readmereadme"

ELSEWHERE = ("git clone ", "hf auth login", "make ", "pip install ", "pip download ")
"""Lines that set a machine up; other tests do that."""

OTHERS = (
    "array=$(sbatch ",
    "llama-server ",
    "lorax-launcher ",
    "ollama ",
    "python -m sglang.",
    "sbatch ",
    "text-generation-launcher ",
    "vllm ",
)
"""Programs of others, which are not installed here."""


@dataclass(frozen=True)
class Block:
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """Those of a page that have something to run here, without the lines that have not."""
    found = []
    for language, code in BLOCK.findall(page.read_text()):
        lines = [line for line in code.splitlines() if not line.startswith(ELSEWHERE + OTHERS)]
        if any(line.strip() and not line.startswith("#") for line in lines):
            found.append(Block(language, "\n".join(lines)))
    return found


def run(block: Block, folder: Path, variables: Mapping[str, str]) -> str:
    """What it printed; an AssertionError if it failed."""
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*command, block.code], cwd=folder, env=dict(variables), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def place(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder that a reader stands in, with all that the pages take as given, and the variables of a user."""
    base = small_model(folder / "my-base")
    for name, rank in (("my-adapter", 8), ("other-adapter", 4), ("old-bone-adapter", 8), ("my-bat-adapter", 8)):
        bat = {"init_weights": "bat"} if "bat" in name else {}
        make_adapter(folder / name, base, r=rank, **bat)
    make_adapter(folder / "my-qlora", base, kind=LoraConfig, r=8)
    for config in folder.glob("*/adapter_config.json"):
        edit_json(config, base_model_name_or_path="user/base")
    bone = folder / "old-bone-adapter"
    shards = load_file(bone / "adapter_model.safetensors")
    save_file(
        {key.replace("miss_", "bone_"): value for key, value in shards.items()}, bone / "adapter_model.safetensors"
    )
    edit_json(bone / "adapter_config.json", peft_type="BONE", mini_r=..., miss_dropout=...)
    with LoopbackHub(folder / "storage", {TOKEN: "user"}) as hub:
        hub.add_folder("user/base", base)
        hub.add_folder("user/my-adapter", folder / "my-adapter")
        given = environment(hub, folder / "home", TOKEN)
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield folder, given | {"PATH": tools, "XDG_CACHE_HOME": str(folder / "cache")}
        assert hub.incidents == []


def small_model(folder: Path) -> Path:
    """A model of a few megabytes that reads and writes words."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.base_model())
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
