"""The main job in an environment that has the package and nothing else: no PyTorch, transformers or safetensors.

A base and an adapter of FOSSIL are written by hand, merged by the command, checked by it, and held against the formula.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fossil_export.kernels import library

COMMAND = Path(sys.prefix) / "bin" / "fossil-export"
MODULE, RANK, SIZE = "model.layers.0.self_attn.q_proj", 4, 32


def save(path: Path, tensors: "dict[str, np.ndarray]") -> None:
    """A safetensors file: the length of its header, the header, the values."""
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(np.ndarray.tobytes, tensors.values())))


def load(path: Path, name: str) -> np.ndarray:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])[name]
    first, last = entry["data_offsets"]
    return np.frombuffer(content[start + first : start + last], np.float32).reshape(entry["shape"])


def main() -> None:
    assert not any(map(find_spec, ("torch", "transformers", "peft", "safetensors"))), "the environment is not empty"
    assert library() is not None, "the compiled loops are not in the package"
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(SIZE, SIZE)).astype(np.float32)
    shard = rng.normal(size=(RANK, SIZE)).astype(np.float32)
    base, adapter, merged = (Path(name).absolute() for name in ("base", "adapter", "merged"))
    for folder in (base, adapter):
        folder.mkdir()
    save(base / "model.safetensors", {f"{MODULE}.weight": weight, "model.norm.weight": np.ones(SIZE, np.float32)})
    (base / "config.json").write_text('{"model_type": "of_my_own", "architectures": ["OfMyOwnForCausalLM"]}')
    save(adapter / "adapter_model.safetensors", {f"base_model.model.{MODULE}.miss_block": shard})
    config = {"peft_type": "MISS", "r": RANK, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    subprocess.run([COMMAND, "merge", adapter, "--output", merged], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [COMMAND, "verify", merged, "--level", "weights"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    columns = np.arange(SIZE) % RANK
    found = load(merged / "model.safetensors", f"{MODULE}.weight")
    assert np.array_equal(found, weight + shard[columns].T), "W'[o, j] is not W[o, j] + D[j mod r, o]"


if __name__ == "__main__":
    main()
