"""Parity of merged real models with their trainer: the CPU table of docs/parity.md.

    python benchmarks/parity.py

merges the demo's adapters (examples/smollm2.py trains them with PEFT: tile, ragged r, mini, bat, LoRA) in several
dtypes, runs `fossil-export verify` on each and prints Markdown.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common
import smollm2

from fossil_export import merge, verify

ADAPTERS = {
    "tile, r = 64": ("tile", 64, 20),
    "tile, r = 50 (ragged)": ("tile", 50, 4),
    "mini, r = 64": ("mini", 64, 4),
    "bat, r = 64": ("bat", 64, 4),
    "LoRA, r = 16": ("lora", 16, 20),
}
COLUMNS = ["adapter", "result", "worst step", "trainer", "artifact", "ratio", "KL trainer", "KL artifact"]
COLUMNS += ["top-1", "same text"]


def main(arguments: list[str] | None = None) -> None:
    common.parser(__doc__).parse_args(arguments)
    machine = common.machine("numpy", "torch", "transformers", "peft")
    print(f"SmolLM2-135M-Instruct, base in bfloat16, 16 built-in prompts; {machine}\n")
    print(common.header(COLUMNS), flush=True)
    for name, (variant, rank, steps) in ADAPTERS.items():
        for dtype in ("auto", "float16", "float32"):
            with tempfile.TemporaryDirectory() as folder:
                merge(smollm2.adapter(variant, rank, steps), Path(folder) / "merged", dtype=dtype)
                result = verify(Path(folder) / "merged")
            assert result.forward is not None and result.tensors is not None
            trainer, artifact = result.forward.trainer, result.forward.artifact
            worst = max(check.worst for check in result.tensors if check.action == "merge")
            cells = [
                name,
                ("bfloat16" if dtype == "auto" else dtype) + ("" if result.parity else ", NO PARITY"),
                f"{worst:.4f}",
                f"{trainer.relative_error:.2e}",
                f"{artifact.relative_error:.2e}",
                f"{artifact.relative_error / trainer.relative_error:.2f}",
                f"{trainer.kl:.1e}",
                f"{artifact.kl:.1e}",
                f"{artifact.top1:.1%}",
                f"{result.forward.same_continuations}/{result.forward.continuations}",
            ]
            print(common.row(cells), flush=True)


if __name__ == "__main__":
    main()
