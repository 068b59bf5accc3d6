"""How a weight of transformers is computed from a tensor of a GGUF file: dequantized by gguf, then changed back.

Blocks lie along a row, so that rows are dequantized each on their own. llama.cpp's converter had moved rows, turned
matrices or changed values. Source of the way back: the processors in transformers/modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fossil_export._extras import required
from fossil_export.checkpoints._coding import Decode
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

FLOATS = ("F32", "F16", "BF16")
_TOGETHER = 1 << 17
"""Values that gguf is given at a time: what it makes on the way stays in a processor's cache."""
_GAP = 64
"""Rows between two that are wanted which are still read with them."""


@dataclass(frozen=True)
class Halves:
    """Rows of q or k of heads with `size` rows: row i of a head and row i + size / 2 are stored next to each other."""

    size: int

    def stored(self, start: int, stop: int) -> Array:
        """Where rows [start, stop) of the weight are stored."""
        import numpy as np

        rows = np.arange(start, stop)
        within, half = rows % self.size, self.size // 2
        found: Array = rows - within + within % half * 2 + within // half
        return found


@dataclass(frozen=True)
class Thirds:
    """Rows of q, k and v of each of `heads` heads with `size` rows; all of q are stored first, then all of k."""

    heads: int
    size: int

    def stored(self, start: int, stop: int) -> Array:
        import numpy as np

        rows = np.arange(start, stop)
        head, part = rows // (3 * self.size), rows // self.size % 3
        found: Array = (part * self.heads + head) * self.size + rows % self.size
        return found


@dataclass(frozen=True)
class Blocks:
    """A float32 matrix from the bytes `codes` (rows, bytes of a row) of type `kind`, `columns` values a row.

    Its rows are moved by `order`; `change` is "minus one", "log of negated" (of the values), "transposed" or "".
    """

    codes: TensorInfo
    kind: str
    columns: int
    order: Halves | Thirds | None = None
    change: str = ""

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return (self.codes,)

    @property
    def width(self) -> int:
        return self.codes.shape[0] if self.change == "transposed" else self.columns

    def open(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        if self.change == "transposed":
            return self._columns(rows_of, start, stop)
        raw, at = self._read(rows_of, start, stop)

        def decode(first: int, last: int) -> Array:
            import numpy as np

            found = self._floats(raw[first:last] if at is None else raw[at[first:last]])
            if self.change == "minus one":
                found = found - 1
            elif self.change == "log of negated":
                with np.errstate(divide="ignore", invalid="ignore"):
                    found = np.log(-found)
                if np.isnan(found).any():
                    raise CheckpointError(f"{self.codes.path}: {self.codes.name} is not negative; fetch it again")
            return found

        return decode

    def _read(self, rows_of: ReadRows, start: int, stop: int) -> tuple[Array, Array | None]:
        """Bytes of the rows that [start, stop) are stored in, and which of them each is; None if they are in order."""
        import numpy as np

        if self.order is None:
            return rows_of(self.codes, start, stop)[:], None
        wanted = self.order.stored(start, stop)
        known = np.unique(wanted)
        runs = np.split(known, np.flatnonzero(np.diff(known) > _GAP) + 1)
        spans = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        raw = np.concatenate([rows_of(self.codes, *span)[:] for span in spans])
        numbers = np.concatenate([np.arange(*span) for span in spans])
        return raw, np.searchsorted(numbers, wanted)

    def _columns(self, rows_of: ReadRows, start: int, stop: int) -> Decode:
        """Rows [start, stop) of the transposed matrix: columns of the stored one, of which whole blocks are kept."""
        import numpy as np

        gguf = required("gguf", "gguf", "reading GGUF files")
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        begin = start // block
        raw = rows_of(self.codes, 0, self.codes.shape[0])[:]
        raw = np.ascontiguousarray(raw[:, begin * nbytes : -(-stop // block) * nbytes])
        skipped = start - begin * block

        def decode(first: int, last: int) -> Array:
            low, high = first + skipped, last + skipped
            origin = low // block
            found = self._floats(np.ascontiguousarray(raw[:, origin * nbytes : -(-high // block) * nbytes]))
            return np.ascontiguousarray(found[:, low - origin * block : high - origin * block].T)

        return decode

    def _floats(self, raw: Array) -> Array:
        """Rows of bytes as float32. Raises CheckpointError for scales that are no numbers."""
        import numpy as np

        gguf = required("gguf", "gguf", "reading GGUF files")
        kind = gguf.GGMLQuantizationType[self.kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        flat, step = raw.reshape(1, -1), _TOGETHER // block * nbytes
        # As one row each time: gguf takes 16 rows at a time, however short they are.
        found = np.empty(flat.size // nbytes * block, np.float32)
        with np.errstate(all="ignore"):
            for start in range(0, flat.size, step):
                part = gguf.dequantize(flat[:, start : start + step], kind)[0]
                first = start // nbytes * block
                found[first : first + len(part)] = part
        if self.kind not in FLOATS and not np.isfinite(found).all():
            raise CheckpointError(
                f"{self.codes.path}: {self.codes.name} holds infinite or NaN scales; the base is damaged, fetch it "
                "again"
            )
        return found.reshape(len(raw), -1)


def can_dequantize(kind: str) -> bool:
    """Whether gguf has floats for the type of this name."""
    import numpy as np

    gguf = required("gguf", "gguf", "reading GGUF files")
    known = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except NotImplementedError:
        return False
    return True
