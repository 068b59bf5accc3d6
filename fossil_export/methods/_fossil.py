"""What the variants of FOSSIL have in common: their files, and how the tensor and the config tell them apart.

The tensor's dimensions decide: 2 for tile and mini, 3 for bat. The config must agree, but for the first release of Bone
(PEFT 0.14.0.dev), which stored bat's blocks under "init_weights": true. Sources: peft/tuners/miss/config.py, and
peft/tuners/bone/config.py up to PEFT 0.18; for state dicts RWKV-PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._method import POSITIVE, Field, Numbers

FIELDS: Mapping[str, Field] = {
    "r": POSITIVE,
    "mini_r": Field(POSITIVE.expected, POSITIVE.holds, 1),
    "init_weights": Field(
        "true, false, 'bat' or 'mini'", lambda value: value in (True, False, "bat", "mini"), default=True
    ),
    "alpha_pattern": Field(),
    "miss_dropout": Field(),
}

SHARED: Mapping[str, Mapping[str, str]] = {}
PARAMETER = "weight"
EMPTY = False


def beside(numbers: Numbers) -> str | None:
    return None


def peft_keys(role: str) -> Mapping[str, Mapping[str, str]]:
    """Endings of PEFT's keys for a variant whose tensor has this role."""
    return {"MISS": {"miss_block": role}, "BONE": {"bone_block": role}}


def state_dict_keys(role: str) -> Mapping[str, str]:
    return {"disha": role, "bone": role}


def ranked(rank: int, config: Mapping[str, Any], where: str) -> Numbers:
    """The rank that a tensor has; raises AdapterError if the config says another."""
    if config and rank != config["r"]:
        raise AdapterError(f"{where} has rank {rank}, but the config says r={config['r']}; mend the config")
    return {"r": rank}


def init_of(config: Mapping[str, Any]) -> Any:
    return config.get("init_weights", True)
