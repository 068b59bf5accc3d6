"""VB-LoRA: a LoRA whose rows are mixtures of vectors that all modules share.

    W' = W + B A        row k of A and column k of B are made of pieces of length L, each Σ softmax(top logits) · V

V (n, L) is the bank, A's logits are (r, in/L, n), B's (out/L, r, n); of each piece's logits the k largest count. A file
with `save_only_topk_weights` has their places and all of their shares but the last, which is what is left of 1. The
mixtures are made in float64. Source: arXiv 2405.15179, section 3; `_get_low_rank_matrix` in
peft/tuners/vblora/layer.py, `_remap_adapter_state_dict_for_load` in model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._arrays import along, exp, narrowed, whole, widest
from fossil_export.methods._base import Base, needs
from fossil_export.methods._lora import SWITCH, unlike
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, neutral
from fossil_export.methods._shira import inside


class Vblora(Base):
    PEFT = {
        "VBLORA": {
            "vblora_logits_A": "A",
            "vblora_logits_B": "B",
            "vblora_logits_A_topk_indices": "#A",
            "vblora_logits_B_topk_indices": "#B",
            "vblora_logits_A_topk_weights": "share A",
            "vblora_logits_B_topk_weights": "share B",
        }
    }
    SHARED = {"VBLORA": {"base_model.vblora_vector_bank": "V"}}
    FIELDS: Mapping[str, Field] = {
        "r": POSITIVE,
        "topk": POSITIVE,
        "num_vectors": POSITIVE,
        "vector_length": POSITIVE,
        "save_only_topk_weights": SWITCH,
        "fan_in_fan_out": SWITCH,
        **neutral("vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
    }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        rank, count, most = config["r"], config["num_vectors"], config["topk"]
        cut = bool(config.get("save_only_topk_weights"))
        roles = ("#A", "share A", "#B", "share B") if cut else ("A", "B")
        if needs(shapes, *roles) or set(shapes) - {*roles, "V"}:
            raise AdapterError(
                f"{where}: these are not what save_only_topk_weights={cut} saves; save the adapter again"
            )
        if "V" not in shapes:
            raise AdapterError(f"{where}: the file lacks base_model.vblora_vector_bank; save the adapter again")
        down, up = (shapes[f"#{role}" if cut else role] for role in "AB")
        last = most if cut else count
        fits = len(down) == 3 == len(up) and (down[0], down[2], up[1], up[2]) == (rank, last, rank, last)
        shares = all(shapes[f"share {role}"] == (*shapes[f"#{role}"][:2], most - 1) for role in "AB") if cut else True
        if not fits or not shares or shapes["V"] != (count, config["vector_length"]) or most > count:
            raise AdapterError(
                f"{where} and r={rank}, num_vectors={count}, topk={most}, vector_length={config['vector_length']} of "
                "the config do not go together; save the adapter again"
            )
        return {"r": rank, "most": most}

    def block_rows(self, shapes: Shapes) -> int:
        return shapes["V"][1]

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        down, up = (shapes.get(role) or shapes[f"#{role}"] for role in "AB")
        length = shapes["V"][1]
        return unlike((up[0] * length, down[1] * length), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        length = arrays["V"].shape[1]
        pieces = slice(start // length, stop // length)
        return {role: array[pieces] if role.endswith("B") else array[:] for role, array in arrays.items()}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        rank, most = numbers["r"], numbers["most"]
        length = arrays["V"].shape[1]
        pieces = slice(start // length, (start + len(weight)) // length)
        rows = {role: array[pieces] for role, array in arrays.items() if role.endswith("B")}
        down = _mixed(arrays, "A", most).reshape(rank, -1)
        up = _mixed({**rows, "V": arrays["V"]}, "B", most).swapaxes(1, 2).reshape(-1, rank)
        return narrowed(up, weight) @ narrowed(down, weight)


def _mixed(arrays: Arrays, role: str, most: int) -> Any:
    """The pieces (…, L), in float64."""
    bank = widest(arrays["V"])
    if role in arrays:
        logits = widest(arrays[role])
        order = logits.argsort(-1)
        found = along(logits, order)
        first = found[..., -most : -most + 1] if most > 1 else found[..., -1:]
        if found.shape[-1] > most and bool((found[..., -most - 1 : -most] == first).any()):
            raise AdapterError(f"two of vblora_logits_{role} are equal, and only one counts; which one nothing tells")
        places = order[..., -most:]
        found = exp(found[..., -most:] - found[..., -1:])
        shares = found / found.sum(-1)[..., None]
    else:
        places, shares = whole(arrays[f"#{role}"]), widest(arrays[f"share {role}"])
        inside(places, len(bank), "vblora_logits_topk_indices")
        found = (bank[places[..., :-1]] * shares[..., None]).sum(-2)
        return found + bank[places[..., -1]] * (1 - shares.sum(-1))[..., None]
    return (bank[places] * shares[..., None]).sum(-2)
