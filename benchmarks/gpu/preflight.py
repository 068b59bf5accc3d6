"""What is at hand, looked at before anything is run: versions, the device, ONNX Runtime's provider."""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import peft
import torch
import transformers

import fossil_export
from gpu.tools import line_of

BRING = "benchmarks/README.md says how to bring onnxruntime-gpu"


@dataclass(frozen=True)
class OnnxPart:
    """Versions of what the ONNX part runs with, the dtypes it can run in, and lines on what it cannot."""

    versions: dict[str, str]
    dtypes: tuple[str, ...]
    left_out: tuple[str, ...]


def no_device(device: str) -> str | None:
    """Why PyTorch cannot compute on `device`, found by computing; None when it can."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return (
            f"no CUDA GPU that PyTorch {torch.__version__} can use; run on a machine with one, "
            "or try the script with --device cpu --small"
        )
    try:
        torch.eye(2, device=device, dtype=torch.float64).mm(torch.eye(2, device=device, dtype=torch.float64)).cpu()
    except Exception as problem:
        return f"PyTorch {torch.__version__} cannot compute on {device}: {line_of(problem)}"
    return None


def machine(device: str) -> dict[str, str]:
    """What a row of any part depends on beside the setup."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "PEFT": peft.__version__,
        "transformers": transformers.__version__,
        "NumPy": np.__version__,
        "fossil-export": fossil_export.__version__,
        "code": code(),
    }


def code() -> str:
    """A digest of the package's and this benchmark's sources: other code may find other rows."""
    digest = hashlib.sha256()
    for folder in (Path(fossil_export.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    digest.update(Path(common.__file__).read_bytes())
    return digest.hexdigest()[:12]


def onnx_part(device: str, dtypes: Sequence[str]) -> OnnxPart:
    """Import what the part needs and run a tiny graph in each dtype on the provider itself."""
    modules: dict[str, Any] = {}
    for package in ("onnx", "onnx_ir", "onnxruntime"):
        try:
            modules[package] = importlib.import_module(package)
        except Exception as problem:  # a package that is there, but does not fit, may raise anything
            return OnnxPart({}, (), (f"onnx: {package} cannot be imported ({line_of(problem)})",))
    from gpu.graphs import why_not

    versions = {package: str(module.__version__) for package, module in modules.items()}
    name = f"onnxruntime {versions['onnxruntime']}"
    if device.startswith("cuda") and "CUDAExecutionProvider" not in modules["onnxruntime"].get_available_providers():
        return OnnxPart(versions, (), (f"onnx: {name} has no CUDA provider; {BRING}",))
    reason = why_not(device, "float32")
    if reason is not None:
        return OnnxPart(versions, (), (f"onnx: {name}: {reason}; {BRING}",))
    reasons = {dtype: why_not(device, dtype) for dtype in dtypes}
    left_out = tuple(f"onnx, {dtype}: {name}: {why}" for dtype, why in reasons.items() if why is not None)
    return OnnxPart(versions, tuple(dtype for dtype in dtypes if reasons[dtype] is None), left_out)
