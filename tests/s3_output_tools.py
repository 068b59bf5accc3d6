"""Models to be merged into an object store, what is there then, and the same merged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, make_adapter, make_base
from s3_tools import S3Server
from transformers import LlamaConfig, LlamaForCausalLM

from fossil_export import merge

RECORD = "fossil_export.json"
TO = "s3://models/merged"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*given: str) -> str:
    """What the command prints."""
    return subprocess.run(
        [sys.executable, "-m", "fossil_export", *given], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def at(server: S3Server, prefix: str = "merged") -> dict[str, bytes]:
    found = server.objects("models", f"{prefix}/")
    return {key.removeprefix(f"{prefix}/"): content for key, content in found.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 29 MB in two files, of which each goes in several parts, an adapter, and their merge."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=6000,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="17MB")
    make_adapter(folder / "adapter", folder / "base", target_modules=QV)
    merge(folder / "adapter", folder / "merged", base=folder / "base", hash=True)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three files, each sent in one request, and two adapters."""
    folder = tmp_path_factory.mktemp("parts")
    make_base(folder / "base", shards="90KB")
    make_adapter(folder / "qv", folder / "base", target_modules=QV)
    make_adapter(folder / "k", folder / "base", target_modules=["k_proj"])
    return folder


@pytest.fixture(scope="module")
def merged(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of `parts`' base with its adapter "qv", merged here."""
    folder = tmp_path_factory.mktemp("merged")
    merge(parts / "qv", folder / "merged", base=parts / "base")
    return files_of(folder / "merged")


def put(parts: Path, adapter: str = "qv", to: str = TO, **how: Any) -> Any:
    return merge(parts / adapter, to, base=parts / "base", **how)
