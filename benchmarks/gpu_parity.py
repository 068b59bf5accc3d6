"""Is the merge, made on a GPU, the model that was trained? Needs a CUDA GPU, no network and no downloaded model.

    python benchmarks/gpu_parity.py --output gpu.md --json gpu.json --seconds 540    # again, until it is complete
    python benchmarks/gpu_parity.py --device cpu --small                             # tries the script, in seconds

Single layers of Llama-3-8B's dimensions and a two-layer model of Llama-3.2-3B's, random, get shards trained through
PEFT; layers of the model run as ONNX graphs, too. The truth is the trained model, unmerged, in float64; the trainer is
the same in the dtype it trained in; the merged weights come from fossil-export on the CPU (NumPy) and on the device
(PyTorch), whose bytes are compared.

What cannot be run is said first. Every row is written to a journal as it comes: the same command takes up again where
a run was cut, and refuses a journal of another machine, version or setup. benchmarks/README.md has the rest.

Exit code 0: all rows that can run are there and within their bounds. 1, naming the rows: a case failed, a merged model
is more than twice as far from the truth as its trainer (plus float32's own noise), or the two devices' bytes differ
for a variant that only adds. 2: the journal or an option was refused. 3: --seconds ran out before the last row.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
NEEDED = ("numpy", "ml_dtypes", "torch", "safetensors", "transformers", "accelerate", "peft", "threadpoolctl", "tqdm")


def main() -> int:
    # The package of this checkout, installed or not.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}; benchmarks/README.md says what is needed", file=sys.stderr)
        return 1
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as problem:  # releases that do not fit each other
            line = next(iter(str(problem).splitlines()), "")
            print(f"{name} cannot be imported ({type(problem).__name__}: {line})", file=sys.stderr)
            return 1
    from gpu.main import main as run

    return run(__doc__ or "", STARTED)


if __name__ == "__main__":
    sys.exit(main())
