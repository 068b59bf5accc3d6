"""An update that does not depend on the weight: y = W x + up · down(x), and so ΔW = up · A with A the matrix of down.

FOSSIL's `down` is a tiling, which has no weights of its own:

    S(x)[k] = sum of x[j] over j with j mod r == k        A[k, j] = 1 where j mod r == k, else 0

Source: arXiv 2409.15371, section 3. S(x) depends on x and r alone, so that layers which read the same x share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tiling:
    """The sums S of rank r."""

    rank: int

    def matrix(self, inputs: int, dtype: Any) -> Array:
        """A (r, in) of ones and zeros."""
        import numpy as np

        found: Array = (np.arange(inputs) % self.rank == np.arange(self.rank)[:, None]).astype(dtype)
        return found

    def sums(self, x: Any) -> Any:
        """S(x) (…, r) of a PyTorch tensor x (…, in): padded with zeros to a multiple of r, cut, added up."""
        import torch

        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.rank))
        return padded.reshape(*x.shape[:-1], -1, self.rank).sum(dim=-2)


@dataclass(frozen=True)
class LowRank:
    """`up` (out, r), and `down`: a tiling, or an array A (r, in)."""

    up: Any
    down: Tiling | Any

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])

    def down_matrix(self, inputs: int) -> Any:
        """A (r, in) in the dtype of `up`, as NumPy arrays."""
        return self.down.matrix(inputs, self.up.dtype) if isinstance(self.down, Tiling) else self.down

    def branch(self, x: Any) -> Any:
        """up · down(x) (…, out) of a PyTorch tensor x (…, in)."""
        down = self.down.sums(x) if isinstance(self.down, Tiling) else x @ self.down.T
        return down @ self.up.T
