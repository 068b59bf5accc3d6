"""LoRA whose training began from another weight than the base's: that weight is made again, as PEFT does on each load.

    W' = R + s · B A        R = round(W - s · B₀ A₀), in the dtype that W is stored in; with m as DoRA of R

PiSSA: B₀ A₀ is the part of W with the r largest singular values, over s. OLoRA: the first r columns of Q, and rows of
R, of W = Q R. KaSA: R is W without its r smallest singular values, and W' = R + s · B diag(d) A.

Source: `pissa_init` and `olora_init` in peft/tuners/lora/layer.py, `_truncate_base_weight` and `_get_delta_weight` of
KaSA in peft/tuners/lora/variants.py; arXiv 2404.02948, 2406.01775, 2412.06071. What PyTorch computes there in float32
is part of the trained model, so PyTorch computes it here too, in the same order. If the adapter brings the weight
itself (PEFT saves a targeted head with its base layer), that is R already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export._extras import required
from fossil_export._threads import one_torch_thread
from fossil_export.errors import AdapterError, MergeError
from fossil_export.methods import _lora as lora
from fossil_export.methods._base import Base, needs
from fossil_export.methods._dora import MAGNITUDE, magnitudes, refuse_strangers, stretch
from fossil_export.methods._method import Arrays, Combination, Numbers, Shapes

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Others PEFT does not begin from.
_OTHERS = ("use_bdlora", "kasa_config", "velora_config", "monteclora_config")
_CLOSE = 2.0**-18
# Of singular values no further apart than this, relative to themselves, float32's noise tells which vectors are taken.


class Started(Base):
    """What they share. The whole weight goes at once. Besides those of `read`, `numbers` needs "dtype", "brought" and
    "transposed" (`Part.numbers`)."""

    COMBINES: Combination = "alone"
    FIELDS = lora.FIELDS
    NAME = ""

    def residual(self, torch: Any, weight: Any, rank: int, scale: float) -> Any:
        """R (out, in) before it is rounded, for `weight` (out, in), both float32 tensors."""
        raise NotImplementedError

    def _read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if shapes.keys() <= {"m", "d"}:
            return None  # no linear layer's
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
        down, up = shapes["A"], shapes["B"]
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        return lora.scaled(config, module, down[0], where)

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["B"][0]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        if numbers.get("dtype", "F32") not in _DTYPES:
            return f"training with {self.NAME} cannot begin from a weight of {numbers['dtype']}"
        return lora.unlike((shapes["B"][0], shapes["A"][1]), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        found = {"A": arrays["A"][:], "B": arrays["B"][start:stop]}
        if "m" in arrays:
            found["m"] = magnitudes(arrays["m"], start, stop)
        return found

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        changed = weight + 0
        self.add(changed, arrays, numbers, start)
        changed -= weight
        return changed

    def add(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> None:
        if "dtype" not in numbers or len(weight) != arrays["B"].shape[0]:
            raise MergeError(
                f"a weight from which training with {self.NAME} began is made again as a whole, in the dtype "
                "that it is stored in; merge the model, and go on from that"
            )
        if not numbers.get("brought"):
            weight[:] = self._began(weight, numbers)
        weight += lora.product(self._up(arrays), arrays["A"], numbers["scale"])
        if "m" in arrays:
            stretch(weight, arrays["m"], 0)

    def _up(self, arrays: Arrays) -> Any:
        return arrays["B"]

    def _began(self, weight: Any, numbers: Numbers) -> Any:
        torch = required("torch", "torch", f"merging {self.NAME}")
        own = hasattr(weight, "device") and hasattr(weight, "requires_grad")
        with torch.no_grad(), one_torch_thread(torch):
            tensor = weight if own else torch.from_numpy(weight)
            found = self.residual(torch, tensor.to(torch.float32), int(numbers["r"]), numbers["scale"])
            rounded = found.to(getattr(torch, _DTYPES[numbers["dtype"]])).to(tensor.dtype)
        return rounded if own else rounded.numpy()

    def _apart(self, values: Any, rank: int) -> None:
        """Raise MergeError if the first `rank` singular values are not told from the others."""
        last = values[rank - 1 : rank + 1].tolist()
        if len(last) == 2 and last[0] - last[1] <= _CLOSE * last[0] and last[0] > _CLOSE * float(values[0]):
            raise MergeError(
                f"singular values {rank} and {rank + 1} of the weight are too close to tell where {self.NAME} began; "
                "convert the adapter with PEFT where it was trained (path_initial_model_for_weight_conversion)"
            )


class Pissa(Started):
    PEFT = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B", **MAGNITUDE}}
    NAME = "pissa"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if config.get("init_lora_weights") != self.NAME:
            return None
        numbers = self._read(config, module, shapes, where)
        if others := [name for name in _OTHERS if config.get(name)]:
            raise AdapterError(
                f"{where}: the config has both {self.NAME} and {others[0]}, which is not understood together"
            )
        if numbers is not None and "m" in shapes:
            refuse_strangers(config, shapes, shapes["B"][0], where)
        elif numbers is not None and config.get("use_dora"):
            raise AdapterError(lora.LOST.format(where=where))
        return numbers

    def residual(self, torch: Any, weight: Any, rank: int, scale: float) -> Any:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self._apart(values, rank)
        root = torch.diag(torch.sqrt(values[:rank] / scale))
        down, up = root @ right[:rank], left[:, :rank] @ root
        return weight - scale * up @ down


class Olora(Pissa):
    NAME = "olora"

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        if numbers.get("transposed"):
            return "PEFT begins with olora from such a weight (Conv1D) the wrong way round"
        return super().mismatch(shapes, numbers, weight)

    def residual(self, torch: Any, weight: Any, rank: int, scale: float) -> Any:
        columns, rows = torch.linalg.qr(weight)
        up, down = columns[:, :rank], rows[:rank].contiguous()
        return weight - scale * up.contiguous() @ down


class Kasa(Started):
    PEFT = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B", "lora_diag": "d"}}
    NAME = "kasa"

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if not config.get("kasa_config"):
            if "d" in shapes:
                raise AdapterError(f"{where}: has a lora_diag, but the config has no kasa_config; mend the config")
            return None
        if config.get("use_dora") or config.get("init_lora_weights") in ("pissa", "olora"):
            raise AdapterError(
                f"{where}: the config has kasa_config and another start, which is not understood together"
            )
        numbers = self._read(config, module, shapes, where)
        if numbers is not None and shapes.get("d") != (numbers["r"],):
            raise AdapterError(f"{where}: its lora_diag is missing, or has not one value for each rank; save it again")
        return numbers

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        if numbers.get("transposed"):
            return "PEFT has no kasa for such a weight (Conv1D)"
        if numbers["r"] >= min(weight):
            return f"kasa of rank {numbers['r']} leaves nothing of the weight"
        return super().mismatch(shapes, numbers, weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**super().part(arrays, start, stop), "d": arrays["d"][:]}

    def _up(self, arrays: Arrays) -> Any:
        return arrays["B"] * arrays["d"]

    def residual(self, torch: Any, weight: Any, rank: int, scale: float) -> Any:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        kept = len(values) - rank
        self._apart(values, kept)
        return (left[:, :kept] * values[:kept]) @ right[:kept]
