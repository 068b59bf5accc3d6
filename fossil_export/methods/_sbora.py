"""SBoRA: LoRA, one of whose matrices has a single one in each row (A) or column (B), and is stored as where these are.

    FA    W'[:, c[k]] = W[:, c[k]] + s · B[:, k]        c (r) columns, B (out, r)
    FB    W'[d[k], :] = W[d[k], :] + s · A[k, :]        d (r) rows, A (r, in)        s = alpha / r

Source: arXiv 2407.05413, section 3; `Linear.forward` in peft/src/peft/tuners/sbora.py (github.com/cityuhkai/SBoRA), and
for QSBoRA, whose folders say peft_type LORA, `update_layer` in QSBoRA/peft_sbora/tuners/lora.py. The sum is float32,
rounded once; the authors' own merge adds in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base
from fossil_export.methods._method import Arrays, Numbers, Shapes

_ENDINGS = {"lora_A": "columns", "lora_B": "rows", "lora_A.weight": "A", "lora_B.weight": "B"}


class Sbora(Base):
    PEFT = {"LORA": _ENDINGS, "SBORA": _ENDINGS}
    FIELDS = lora.FIELDS
    INDEXES = frozenset({"columns", "rows"})

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if not self.INDEXES & shapes.keys() and config.get("peft_type") != "SBORA":
            return None
        if shapes.keys() not in ({"columns", "B"}, {"rows", "A"}):
            raise AdapterError(f"{where}: one half is missing, or there is too much; save the adapter again")
        rank = shapes["columns" if "B" in shapes else "rows"]
        other = shapes["B"][1:] if "B" in shapes else shapes["A"][:1]
        if len(rank) != 1 or rank != other or len(shapes["B" if "B" in shapes else "A"]) != 2:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        return lora.scaled(config, module, rank[0], where)

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = (shapes["B"][0], weight[1]) if "B" in shapes else (weight[0], shapes["A"][1])
        return lora.unlike(found, weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        if "B" in arrays:
            return {"columns": arrays["columns"][:], "B": arrays["B"][start:stop]}
        rows = arrays["rows"][:]
        _check(rows, None)
        return {"rows": rows - start, "A": arrays["A"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        count, inputs = weight.shape
        if "B" in arrays:
            up, down = arrays["B"][start : start + count], _ones(arrays["columns"], 0, inputs, arrays["B"])
            _check(arrays["columns"], inputs)
        else:
            up, down = _ones(arrays["rows"], start, count, arrays["A"]).T, arrays["A"]
        return lora.product(up, down, numbers["scale"])


def _ones(places: Any, start: int, count: int, like: Any) -> Any:
    """(r, count) with a one in each row, at its place less `start`, if that is one of [0, count)."""
    if hasattr(like, "device") and hasattr(like, "contiguous"):
        import torch

        where = torch.arange(start, start + count, device=like.device)
        return (where[None] == places[:, None].to(where.dtype)).to(like.dtype)
    import numpy as np

    return (np.arange(start, start + count)[None] == np.asarray(places)[:, None]).astype(like.dtype)


def _check(places: Any, count: int | None) -> None:
    """Raises AdapterError for places that a weight does not have."""
    if len(places) and (int(places.min()) < 0 or (count is not None and int(places.max()) >= count)):
        raise AdapterError(
            f"SBoRA's lora_A or lora_B has numbers from {int(places.min())} to {int(places.max())}, and the weight "
            f"{count} places for them; fetch the adapter again"
        )
