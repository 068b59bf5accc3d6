"""What the methods share that turn inputs by orthogonal blocks, in NumPy and PyTorch alike.

The blocks are made in float64 and rounded once, so that float32 is lost in the product with the weight alone.
"""

from __future__ import annotations

from typing import Any


def wide(array: Any) -> Any:
    """The same in float64."""
    import numpy as np

    return array.double() if hasattr(array, "requires_grad") else np.asarray(array, np.float64)


def like(array: Any, weight: Any) -> Any:
    """The same in the dtype of `weight`."""
    return array.to(weight.dtype) if hasattr(array, "requires_grad") else array.astype(weight.dtype)


def identity(size: int, beside: Any) -> Any:
    """(size, size) in float64, where `beside` is."""
    if hasattr(beside, "requires_grad"):
        import torch

        return torch.eye(size, dtype=torch.float64, device=beside.device)
    import numpy as np

    return np.eye(size)


def skew(vectors: Any, size: int) -> Any:
    """Skew-symmetric matrices (n, size, size), whose upper triangles by rows are the vectors (n, size·(size-1)/2)."""
    if hasattr(vectors, "requires_grad"):
        import torch

        made = torch.zeros(len(vectors), size, size, dtype=vectors.dtype, device=vectors.device)
        rows, columns = torch.triu_indices(size, size, 1)
    else:
        import numpy as np

        made = np.zeros((len(vectors), size, size), vectors.dtype)
        rows, columns = np.triu_indices(size, 1)
    made[:, rows, columns] = vectors
    return made - made.swapaxes(1, 2)


def cayley(matrices: Any) -> Any:
    """(I - S)(I + S)⁻¹ of skew-symmetric matrices S (n, size, size)."""
    eye = identity(matrices.shape[-1], matrices)
    if hasattr(matrices, "requires_grad"):
        import torch

        return torch.linalg.solve(eye + matrices, eye - matrices)  # the two commute
    import numpy as np

    return np.linalg.solve(eye + matrices, eye - matrices)


def by_blocks(weight: Any, blocks: Any) -> Any:
    """W diag(M₁, M₂, …) for rows W (n, in) and blocks (in/size, size, size), or a single one that all share."""
    count, size = len(weight), blocks.shape[-1]
    cut = weight.reshape(count, -1, size)
    if len(blocks) == 1:
        return (cut @ blocks[0]).reshape(weight.shape)
    return (cut.swapaxes(0, 1) @ blocks).swapaxes(0, 1).reshape(weight.shape)
