"""What NumPy arrays and PyTorch tensors do not spell alike."""

from __future__ import annotations

from typing import Any


def is_torch(x: Any) -> bool:
    return hasattr(x, "is_cuda")


def widest(x: Any) -> Any:
    """`x` in float64."""
    return x.double() if is_torch(x) else x.astype("float64")


def narrowed(x: Any, like: Any) -> Any:
    """`x` in the dtype of `like`."""
    return x.to(like.dtype) if is_torch(x) else x.astype(like.dtype)
