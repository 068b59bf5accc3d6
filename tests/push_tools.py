"""Artifacts to publish, and what is on the Hub afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
from huggingface_hub import metadata_load
from loopback import LoopbackHub
from onnx import TensorProto, helper

from fossil_export import convert, merge

JUNK = {
    "training_args.bin", "optimizer.pt", "trainer_state.json", "notes.txt", "wandb/run-1/files/output.log",
    "checkpoint-10/model.safetensors", "runs/events.out.tfevents.1", "rng_state.pth", "predictions.csv",
}  # fmt: skip
HIDDEN = {".env", ".git/config", ".cache/huggingface/token", ".ipynb_checkpoints/a.json"}
WORDS = "---\nlicense: cc0-1.0\n---\n\n# Mascot\n\nTrained with care. ![Loss](docs/loss%20curve.png)\n"


def litter(folder: Path, *names: str) -> set[str]:
    """Put what lies about beside models into a folder; returns the names that can be seen."""
    for name in (*JUNK, *HIDDEN, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"HF_TOKEN=hf_secretsecret " + name.encode())
    return JUNK | set(names)


def published(hub: LoopbackHub, repo: str = "ada/new", revision: str = "main") -> dict[str, bytes]:
    return {name: hub.read(repo, name, revision) for name in hub.files(repo, revision) if name != ".gitattributes"}


def card_of(hub: LoopbackHub, tmp_path: Path, repo: str = "ada/new") -> tuple[dict[str, Any], str]:
    """The metadata as the Hub's client reads it, and the text."""
    path = tmp_path / "published.md"
    path.write_bytes(hub.read(repo, "README.md"))
    return dict(metadata_load(path) or {}), path.read_text()


def graph(folder: Path) -> Path:
    """An ONNX folder whose graph keeps its weights in a file that no pattern knows."""
    folder.mkdir()
    weights = helper.make_tensor("W", TensorProto.FLOAT, [64, 64], bytes(4 * 64 * 64), raw=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    made = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", ends[:1], ends[1:], [weights])
    onnx.save(helper.make_model(made), folder / "model.onnx", save_as_external_data=True, location="base-of-it")
    for name in ("config.json", "genai_config.json", "tokenizer.json", "adapter.onnx_adapter"):
        (folder / name).write_text("{}")
    return folder


def made(kind: str, hub: LoopbackHub, models: Path, folder: Path) -> Path:
    """An artifact of the adapter ada/adapter."""
    if kind == "merged":
        return merge("ada/adapter", folder).output
    if kind == "lora":
        return convert("ada/adapter", folder, to="lora").output
    if kind == "miss":
        ignored = shutil.ignore_patterns("checkpoint-*", "README.md")
        return Path(shutil.copytree(models / "adapter", folder, ignore=ignored))
    if kind == "onnx":
        return graph(folder)
    folder.mkdir()
    file = convert("ada/adapter", folder / "adapter.gguf", to="gguf-lora").output
    return file if kind == "gguf-file" else folder
