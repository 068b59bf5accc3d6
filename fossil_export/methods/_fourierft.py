"""FourierFT: some coefficients of the update's Fourier transform.

    ΔW = s · Re(F⁻¹ C), with C (out, in) zero but for C[i[k] div in, i[k] mod in] = c[k]

The file has c (n) only. PEFT draws the places i anew whenever it makes or loads such an adapter, the first n of a
random order of all places that PyTorch makes from `random_loc_seed`; so does this, with the very same call. The
transform is float64 here. Source: arXiv 2405.03003, section 3; `update_layer` and `get_delta_weight` in
peft/tuners/fourierft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export._extras import need, require
from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import is_torch, scattered, widest
from fossil_export.methods._base import WHOLE, Base
from fossil_export.methods._lora import PATTERN, SWITCH, is_number, of_pattern
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Fourierft(Base):
    PEFT = {"FOURIERFT": {"fourierft_spectrum": "c"}}
    FIELDS: Mapping[str, Field] = {
        "n_frequency": POSITIVE,
        "n_frequency_pattern": PATTERN,
        "scaling": Field("a number", is_number, 150.0),
        "random_loc_seed": Field("a whole number", _is_whole, 777),
        "fan_in_fan_out": SWITCH,
        **neutral("init_weights"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if len(shapes["c"]) != 1:
            raise AdapterError(f"{where} is no vector; save the adapter again")
        said = of_pattern(config, "n_frequency_pattern", module, config["n_frequency"], where, shapes["c"][0])
        if said != shapes["c"][0]:
            raise AdapterError(f"{where} has {shapes['c'][0]} values, but the config says n_frequency={said}")
        require(f"{where}: drawing its frequencies", need("torch"))
        return {"seed": config.get("random_loc_seed", 777), "scale": config.get("scaling", 150.0)}

    def block_rows(self, shapes: Shapes) -> int:
        return WHOLE

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        count = shapes["c"][0]
        return None if count <= weight[0] * weight[1] else f"it has {count} frequencies, more than the weight"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"c": arrays["c"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        import torch

        values = widest(arrays["c"])
        order = torch.randperm(
            weight.shape[0] * weight.shape[1], generator=torch.Generator().manual_seed(numbers["seed"])
        )
        places = order[: len(values)]
        if is_torch(weight):
            dense = scattered(values, places.to(values.device), widest(weight))
            return torch.fft.ifft2(dense).real * numbers["scale"]
        import numpy as np

        return np.fft.ifft2(scattered(values, places.numpy(), weight)).real * numbers["scale"]
