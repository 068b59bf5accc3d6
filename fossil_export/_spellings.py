"""How dtypes, sizes and devices may be written: one place for all options, arguments and config fields.

Nothing heavy is imported: a dtype of PyTorch's or NumPy's is known by its name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from fossil_export.errors import FossilExportError

_DTYPES = {
    "float64": ("f64", "fp64", "double"),
    "float32": ("f32", "fp32", "float"),
    "float16": ("f16", "fp16", "half"),
    "bfloat16": ("bf16",),
}
"""PyTorch's names, and what else they are called: by safetensors, llama.cpp, ONNX, trainers, and PyTorch itself."""

_NAMED = {name: one for one, names in _DTYPES.items() for name in (one, *names)}
_MODULE = re.compile(r"(torch|np|numpy|ml_dtypes|jnp)\.")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP]?)(I?)B|([KMGTP])(I?))", re.IGNORECASE | re.ASCII)
_MOST = sys.maxsize
"""Bytes: no file has more, and more digits are no number that can be shown."""
_UNITS = ("KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB")
_DEVICE = re.compile(r"(cpu|cuda|gpu)(?::(\d{1,4}))?", re.ASCII)

Name = TypeVar("Name", bound=str)


def dtype_named(given: object) -> str | None:
    """PyTorch's name of a floating-point dtype: "bfloat16" for "bf16", "BF16", "torch.bfloat16" and the objects of
    PyTorch's and NumPy's that they are; None for anything else."""
    return _NAMED.get(_plain(given))


def chosen(given: object, known: Iterable[Name]) -> Name | None:
    """Which of the words `known` is meant by `given`, whose dtypes may be spelled in another way; None for none."""
    meant = _key(given)
    return next((one for one in known if _key(one) == meant), None)


def expected(known: Iterable[str]) -> str:
    """`known` for a message: "expected auto, float32, bfloat16 (bf16, torch.bfloat16 and such are understood)"."""
    names = list(known)
    other = next((name for name in ("bfloat16", "fp16", "f16") if name in names), None)
    also = {"bfloat16": "bf16 and torch.bfloat16", "fp16": "float16 and torch.float16", "f16": "float16 and fp16"}
    return f"expected {', '.join(names)}" + (f"; {also[other]} mean {other}, and so on" if other else "")


def _key(given: object) -> str:
    return dtype_named(given) or _plain(given)


def _plain(given: object) -> str:
    if isinstance(given, type):  # np.float32, ml_dtypes.bfloat16; Python's own float is no such dtype
        return given.__name__ if given.__module__ != "builtins" else ""
    return _MODULE.sub("", str(given).strip().lower(), count=1)


def parse_size(given: object, what: str = "max_shard_size", error: type[FossilExportError] = FossilExportError) -> int:
    """Bytes: of a number these, of a string one with a unit, like "5GB" (10**9 each, as the Hub counts) or "500 MiB"
    (1024**2 each). Raises `error` for anything else; a bare "5" leaves open what of."""
    if isinstance(given, float) or (hasattr(given, "__index__") and not isinstance(given, bool)):
        whole = not isinstance(given, float) or given.is_integer()  # neither infinity nor NaN is
        if whole and 0 < int(given) <= _MOST:
            return int(given)
        raise error(f"{what} is {given!r}, expected a whole number of bytes, more than 0, or a size like 5GB")
    text = str(given).strip()
    if match := _SIZE.fullmatch(text):
        from decimal import Decimal  # commands must start fast

        step = 1024 if match[3] or match[5] else 1000
        size = int(Decimal(match[1]) * step ** " KMGTP".index((match[2] or match[4] or " ").upper()))
        if 0 < size <= _MOST:
            return size
    raise error(f"{what} is {given!r}, expected a size like 5GB or 500MiB; units are B, {', '.join(_UNITS)}")


def device_named(given: object, error: type[FossilExportError] = FossilExportError) -> str:
    """The device that `given` means, as PyTorch calls it: "cpu", "cuda" or "cuda:1"; "gpu" is "cuda". "cpu:0" is
    PyTorch's CPU, by which a merge has PyTorch compute.

    Raises `error` for all others: nothing was ever tried on them.
    """
    match = _DEVICE.fullmatch(str(given).strip().lower())
    if match is None or (match[1] == "cpu" and int(match[2] or 0)):
        raise error(f"device is {str(given)!r}, expected cpu, cuda or cuda:N (gpu means cuda); use --device cpu")
    kind = "cpu" if match[1] == "cpu" else "cuda"
    return f"{kind}:{int(match[2])}" if match[2] else kind


def cuda_missing(device: str, torch: Any) -> str | None:
    """The line for a GPU that PyTorch, the module, does not find here; None for a device that it does."""
    if not device.startswith("cuda"):
        return None
    if not torch.cuda.is_available():
        return device_missing(device, "PyTorch finds no CUDA GPU")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) < count:
        return None
    return device_missing(device, f"PyTorch finds {count} CUDA GPU{'s' if count > 1 else ''}")


def device_missing(device: str, why: str) -> str:
    """The line for a device that this machine, or a library on it, does not have."""
    return f"device {device!r} is not available here ({why}); use --device cpu"
