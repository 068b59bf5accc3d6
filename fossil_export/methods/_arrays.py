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


def whole(x: Any) -> Any:
    """`x` in int64."""
    return x.long() if is_torch(x) else x.astype("int64")


def exp(x: Any) -> Any:
    if is_torch(x):
        return x.exp()
    import numpy as np

    return np.exp(x)


def along(x: Any, places: Any) -> Any:
    """The values of `x` at `places` of its last axis."""
    if is_torch(x):
        return x.gather(-1, places)
    import numpy as np

    return np.take_along_axis(x, places, -1)


def scattered(values: Any, places: Any, like: Any) -> Any:
    """Zeros of the shape of `like` with `values` added at `places` of them, taken as one row."""
    if is_torch(values):
        return like.new_zeros(like.shape).reshape(-1).scatter_add(0, places, values).reshape(like.shape)
    import numpy as np

    found = np.zeros(like.size, values.dtype)
    np.add.at(found, places, values)
    return found.reshape(like.shape)
