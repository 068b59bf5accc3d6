"""C3A: blocks that are circulant matrices of trained vectors.

    W'[m b + p, n b + q] = W[m b + p, n b + q] + w[m, n, (q - p) mod b] / in        w (out/b, in/b, b)

PEFT gets there by Fourier transforms, whose rounding this has not. Source: arXiv 2407.19342, section 3;
`get_circulant_fast` in peft/tuners/c3a/utils.py and `get_delta_weight` in layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._lora import PATTERN, of_pattern, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral


class C3a(Base):
    PEFT = {"C3A": {"c3a_kernel": "w"}}
    FIELDS: Mapping[str, Field] = {
        "block_size": POSITIVE,
        "block_size_pattern": PATTERN,
        **neutral("init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if len(shapes["w"]) != 3:
            raise AdapterError(f"{where} should be (out/b, in/b, b); save the adapter again")
        said = of_pattern(config, "block_size_pattern", module, config["block_size"], where, shapes["w"][2])
        if said != shapes["w"][2]:
            raise AdapterError(f"{where} has blocks of {shapes['w'][2]}, but the config says block_size={said}")
        return {"r": said}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["w"][2]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        down, across, size = shapes["w"]
        return unlike((down * size, across * size), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        size = arrays["w"].shape[2]
        return {"w": arrays["w"][start // size : stop // size]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        import numpy as np

        size = arrays["w"].shape[2]
        blocks = arrays["w"][start // size : (start + len(weight)) // size]
        turned = (np.arange(size) - np.arange(size)[:, None]) % size
        found = blocks[:, :, turned] / weight.shape[1]  # (out/b, in/b, b, b)
        return found.swapaxes(1, 2).reshape(weight.shape)
