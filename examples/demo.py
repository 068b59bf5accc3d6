"""Train a FOSSIL adapter on a real model, merge it with fossil-export, compare the answers.

    python examples/demo.py

The model and the adapter are made once and cached (see smollm2.py).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import smollm2


def main() -> None:
    logging.captureWarnings(True)
    print("1. the base model, SmolLM2-135M-Instruct (made the first time)", flush=True)
    base = smollm2.base_model()
    print(f"   {base}")
    print("2. an adapter, trained on it by PEFT (about a minute the first time)", flush=True)
    adapter = smollm2.adapter()
    print(f"   {adapter}")
    with tempfile.TemporaryDirectory() as temporary:
        merged = Path(temporary) / "merged"
        command = ["fossil-export", "merge", str(adapter), "--base", str(base), "--output", str(merged)]
        print(f"3. $ {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", *["fossil_export", *command[1:]]], check=True)
        print(f'4. "{smollm2.PROMPT} …"', flush=True)
        print(f"   base:   {smollm2.answer(base)}")
        print(f"   merged: {smollm2.answer(merged)}")
    print("Next, with an adapter of your own (a folder that PEFT saved, or its id on the Hub):")
    for arguments in ("inspect my-adapter", "merge my-adapter --output my-model", "verify my-model"):
        print(f"   {_program()} {arguments}")


def _program() -> str:
    """The command of the environment that this runs in, as it is typed here."""
    path = Path(sys.executable).with_name("fossil-export")
    if not path.is_file():
        return "fossil-export"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
