"""A LoRA the whole way: trained, merged, verified, swapped in ONNX Runtime, and in llama.cpp if that is installed.

    python examples/lora.py

The model (SmolLM2-135M) and the LoRA are made once and cached (see smollm2.py). What it does, as commands:

    fossil-export merge LORA --output merged
    fossil-export verify merged
    fossil-export onnx LORA --mode swappable --precision int4 --output graph
    fossil-export convert LORA --to gguf-lora --output lora.gguf
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import chat
import smollm2

from fossil_export import convert, export_onnx, merge, verify


def main(level: Literal["all", "weights"] = "all") -> dict[str, str]:
    """Show the answers and return them, by who gave them. `level` is how `verify` looks at the merged model."""
    logging.captureWarnings(True)
    print("1. a LoRA of rank 16, trained by PEFT (about a minute the first time)", flush=True)
    lora = smollm2.adapter("lora", 16, 20)
    answers: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = merge(lora, folder / "merged")
        print(f"2. merged in {result.seconds:.1f} s", flush=True)
        _tell(answers, "base", smollm2.answer(smollm2.base_model()))
        _tell(answers, "merged", smollm2.answer(folder / "merged"))
        print("3. verified, against PEFT's unmerged model in float64", flush=True)
        found = verify(folder / "merged", level=level)
        answers["verdict"] = "parity" if found.parity else "NOT the trained model"
        print(f"   {answers['verdict']}", flush=True)

        print("4. an int4 ONNX graph that takes it as an input", flush=True)
        export_onnx(lora, folder / "graph", mode="swappable", runtime="genai", precision="int4", progress=True)
        session = chat.Chat(folder / "graph")
        session.load("lora", folder / "graph" / "adapter.onnx_adapter")
        for speaker in ("base", "lora"):
            _tell(answers, f"onnx, {speaker}", "".join(session.answer(smollm2.PROMPT, speaker)))

        made = convert(lora, folder / "lora.gguf", to="gguf-lora")
        print(f"5. a GGUF file of {made.nbytes / 1e6:.0f} MB", flush=True)
        if importlib.util.find_spec("llama_cpp") is None:
            print("   llama.cpp is not here (pip install llama-cpp-python)")
        else:
            _tell(answers, "llama.cpp", in_llama_cpp(folder / "lora.gguf"))
    return answers


def in_llama_cpp(lora: Path | None, tokens: int = chat.TOKENS) -> str:
    """The greedy continuation by llama.cpp over the demo's own GGUF, with a LoRA if there is one."""
    from llama_cpp import Llama

    model = Llama(
        str(smollm2.gguf()), lora_path=str(lora) if lora is not None else None, n_ctx=256, n_gpu_layers=0, verbose=False
    )
    output = model(smollm2.PROMPT, max_tokens=tokens, temperature=0.0)
    return str(output["choices"][0]["text"]).strip()


def _tell(answers: dict[str, str], speaker: str, answer: str) -> None:
    answers[speaker] = " ".join(answer.split())
    print(f"   {speaker:10}  …{answers[speaker]}", flush=True)


if __name__ == "__main__":
    main()
