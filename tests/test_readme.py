"""The README's commands and snippets, as they are printed, one after the other in one folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import smollm2
import torch
from conftest import edit_json, make_adapter
from loopback import LoopbackHub, environment
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fossil_export.onnx.builders import BUILDERS

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("make ", "pip install", "hf auth login")
"""Lines that set a machine up; other tests do that."""

TOKEN = "hf_readmereadme"


def blocks() -> list[tuple[str, str]]:
    """(language, code) of each block that has something to run here."""
    found = []
    for language, code in BLOCK.findall(README.read_text()):
        lines = [line for line in code.splitlines() if not line.startswith(ELSEWHERE)]
        if any(line.strip() for line in lines):
            found.append((language, "\n".join(lines)))
    return found


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder that a reader stands in, with all that the README takes as given, and the variables of a user."""
    folder = tmp_path_factory.mktemp("readme")
    base = small_model(folder / "base")
    for name, rank in (("my-adapter", 8), ("other-adapter", 4), ("old-bone-adapter", 8)):
        make_adapter(folder / name, base, r=rank)
        edit_json(folder / name / "adapter_config.json", base_model_name_or_path="user/base")
    make_adapter(folder / "my-qlora", base, kind=LoraConfig, r=8)
    edit_json(folder / "my-qlora" / "adapter_config.json", base_model_name_or_path="user/base")
    bone = folder / "old-bone-adapter"
    shards = load_file(bone / "adapter_model.safetensors")
    save_file(
        {key.replace("miss_", "bone_"): value for key, value in shards.items()}, bone / "adapter_model.safetensors"
    )
    edit_json(bone / "adapter_config.json", peft_type="BONE", mini_r=..., miss_dropout=...)
    (folder / "base-graph").mkdir()
    BUILDERS["genai"].build(base, folder / "base-graph", "fp32", "cpu")
    with LoopbackHub(folder / "storage", {TOKEN: "user"}) as hub:
        hub.add_folder("user/base", base)
        hub.add_folder("user/my-adapter", folder / "my-adapter")
        given = environment(hub, folder / "home", TOKEN)
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield folder, given | {"PATH": tools, "XDG_CACHE_HOME": str(folder / "cache")}
        assert hub.incidents == []


def test_every_block_runs_in_order(place: tuple[Path, dict[str, str]]) -> None:
    folder, variables = place
    said = []
    for language, code in blocks():
        if "examples/" in code:
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert sum("parity" in text for text in said) >= 3
    certificate = json.loads((folder / "my-model" / "fossil_parity.json").read_text())
    assert certificate["parity"] and (folder / "parity.html").is_file()


def test_the_blocks_are_found() -> None:
    """If the README's form changes, the test above must not run nothing."""
    code = "\n".join(text for _, text in blocks())
    for words in ("fossil-export merge", "onnx", "convert", "push", "verify", "InferenceSession", "og.Generator"):
        assert words in code
