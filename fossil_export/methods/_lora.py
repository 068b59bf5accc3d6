"""LoRA: a product of two thin matrices.

    W' = W + s · B A        A (r, in), B (out, r), s = alpha / r, with rsLoRA alpha / √r

Of a convolution A is (r, in, *kernel) and B (out, r, 1, …), and the weight (out, in, *kernel) is taken as a matrix
(out, in · kernel). Source: arXiv 2106.09685, section 4.1; for rsLoRA arXiv 2312.03732; `get_delta_weight` in
peft/tuners/lora/layer.py, whose order of operations this is: the product first, then s, then the sum, in float32.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from fossil_export._patterns import Pattern, PatternError, pattern_of
from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base, needs
from fossil_export.methods._low_rank import LowRank
from fossil_export.methods._method import POSITIVE, Arrays, Field, Numbers, Shapes, unset

_TOKENS = "the update depends on the tokens, so that no weight holds it; serve the adapter beside the model"
_BASE = (
    "training began from changed weights, which nothing tells again (they are random, or came from data or a "
    "quantization); convert the adapter with PEFT where it was trained "
    "(save_pretrained with path_initial_model_for_weight_conversion), or for loftq merge into the base that it made"
)
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
# Starts that leave the base's weights as they are, and two that are made again (methods/_starts.py).

LOST = "{where}: the config says use_dora, but the lora_magnitude_vector is missing; save the adapter again"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or value is None


def _is_blocks(value: Any) -> bool:
    """PEFT's BdLoraConfig, as it is saved."""
    if not value:
        return True
    if not isinstance(value, dict) or not POSITIVE.holds(value.get("nblocks", 1)):
        return False
    sides = (value.get(f"target_modules_bd_{side}") or [] for side in ("a", "b"))
    return all(isinstance(side, list) and all(isinstance(part, str) for part in side) for side in sides)


PATTERN = Field(
    "a map of modules to numbers",
    lambda value: value is None or (isinstance(value, dict) and all(map(is_number, value.values()))),
)
NUMBER = Field("a number", is_number, 1.0)
SWITCH = Field("true or false", _is_bool, False)

FIELDS: Mapping[str, Field] = {
    "r": POSITIVE,
    "lora_alpha": Field("a number", is_number, 8),
    "lora_dropout": Field(),
    "fan_in_fan_out": SWITCH,
    "use_rslora": SWITCH,
    "lora_bias": SWITCH,
    "use_dora": SWITCH,
    "kasa_config": Field(),
    "use_bdlora": Field("nothing, or what PEFT saves of a BdLoraConfig", _is_blocks),
    "rank_pattern": PATTERN,
    "alpha_pattern": PATTERN,
    "init_lora_weights": Field(
        f"one of {', '.join(map(str, _INITS))}", lambda value: value in _INITS, default=True, why=_BASE
    ),
    # What only says how training began or ran.
    "eva_config": Field(),
    "runtime_config": Field(),
    "megatron_config": Field(),
    "megatron_core": Field(),
    "qalora_group_size": Field(),
    "velora_config": Field(),
    "ensure_weight_tying": Field(),
    "loftq_config": Field(),
    "corda_config": Field(),
    "lora_ga_config": Field(),
    "alora_invocation_tokens": unset(_TOKENS),
    "arrow_config": unset(_TOKENS),
    "use_qalora": unset("its inputs are pooled, which only a GPTQ layer of PEFT can do"),
    "monteclora_config": Field(),
}


_SAMPLER = ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
_TRAINING = {"lora_velora_embed": "velora", **{f"lora_monteclora_sampler.{name}": name for name in _SAMPLER}}
# Tensors of VeLoRA, which changes gradients alone, and of MonteCLoRA, whose noise is for training alone: what both
# compute after training is a plain LoRA (`VeloraLinearVariant`, `MontecloraLinearVariant` in
# peft/tuners/lora/variants.py).
_TRAINED_BY = {"velora_config": {"velora"}, "monteclora_config": set(_SAMPLER)}


class Lora(Base):
    PEFT: Mapping[str, Mapping[str, str]] = {"LORA": {"lora_A.weight": "A", "lora_B.weight": "B", **_TRAINING}}
    FIELDS = FIELDS

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if lacking := needs(shapes, "A", "B"):
            raise AdapterError(f"{where}: its lora_{lacking} is missing; save the adapter again")
        for field, roles in _TRAINED_BY.items():
            if roles & shapes.keys() and not config.get(field):
                raise AdapterError(
                    f"{where}: has what is saved with {field}, which the config does not have; mend the config"
                )
        if re.search(r"\.base_layer\.(?!base_layer(\.|$))", module):
            raise AdapterError(
                f"{where}: lies in an nn.MultiheadAttention, where PEFT adds each update in a way of its own (that of "
                "out_proj twice), which fossil-export does not do; merge it with PEFT's merge_and_unload"
            )
        if "m" not in shapes and config.get("use_dora"):
            raise AdapterError(LOST.format(where=where))
        down, up = shapes["A"], shapes["B"]
        flat = all(size == 1 for size in up[2:])
        if len(down) < 2 or len(down) != len(up) or up[1] != down[0] or not flat:
            raise AdapterError(f"{where}: the two do not go together; save the adapter again")
        return scaled(config, module, down[0], where)

    def dimensions(self, shapes: Shapes) -> int:
        return len(shapes["A"])

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return unlike((shapes["B"][0], math.prod(shapes["A"][1:])), weight)

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"A": arrays["A"][:], "B": arrays["B"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return self.narrow(arrays, numbers, start, len(weight))

    def narrow(self, arrays: Arrays, numbers: Numbers, start: int, count: int, out: Any = None) -> Any:
        up = arrays["B"][start : start + count]
        return product(up.reshape(len(up), -1), arrays["A"].reshape(up.shape[1], -1), numbers["scale"], out)

    def form_rank(self, shapes: Shapes) -> int | None:
        return shapes["A"][0] if len(shapes["A"]) == 2 else None

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        if len(arrays["A"].shape) != 2:
            return None
        return LowRank(arrays["B"] * numbers["scale"], arrays["A"])


def scaled(config: Mapping[str, Any], module: str, rank: int, where: str) -> Numbers:
    """The rank and the scale of a module; raises AdapterError if the config says another rank.

    Source: `_create_and_replace` in peft/tuners/lora/model.py.
    """
    said = of_pattern(config, "rank_pattern", module, config["r"], where, rank)
    if said != rank:
        raise AdapterError(f"{where} has rank {rank}, but the config says r={said}; mend the config")
    alpha = alpha_of(config, module, config.get("lora_alpha", FIELDS["lora_alpha"].default), where)
    return {"r": rank, "scale": alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank}


def alpha_of(config: Mapping[str, Any], module: str, otherwise: Any, where: str) -> Any:
    """The alpha of a module; raises AdapterError if `alpha_pattern` has several for it.

    Training took the first of them, but `save_pretrained` in peft/config.py sorts them, and no shape tells an alpha.
    """
    found = matching(config, "alpha_pattern", module, where)
    if len(set(found.values())) > 1:
        several = ", ".join(f"{key!r}: {value}" for key, value in found.items())
        raise AdapterError(
            f"{where}: alpha_pattern has several values for it ({several}); training took the first, but PEFT sorts "
            "them when it saves; keep the one it was trained with"
        )
    return next(iter(found.values()), otherwise)


def of_pattern(
    config: Mapping[str, Any], field: str, module: str, otherwise: Any, where: str, told: int | None = None
) -> Any:
    """The value of the first key that matches a module's name or its end (`get_pattern_key` in peft/utils/other.py).

    Of several it is the one that the tensors have `told`, as PEFT sorts the keys when it saves them.
    """
    values = list(matching(config, field, module, where).values())
    return told if told in values else next(iter(values), otherwise)


def matching(config: Mapping[str, Any], field: str, module: str, where: str) -> dict[str, Any]:
    """The keys of a field that match a module's name or its end, and their values."""
    pattern: Mapping[str, Any] | None = config.get(field)
    if not pattern:
        return {}
    keys = _keys_of(pattern) if len(pattern) > _FEW and "\n" not in module else None
    found = {}
    for key in pattern if keys is None else keys.candidates(module):
        try:
            one = pattern_of(key, *_AROUND) if keys is None else keys.pattern(key)
            if one.match(module) is not None:
                found[key] = pattern[key]
        except PatternError as problem:
            raise AdapterError(f"{where}: the config's {field}: {key!r} {problem}") from problem
    return found


_AROUND = r"(.*\.)?(", ")$"

_FEW = 16
# Keys that are tried one by one.

_DOT = "\0"
# Stands for a dot that is meant as one.

_PLAIN = re.compile(rf"[\w.{_DOT}]+", re.ASCII)


class _Keys:
    """Keys of a pattern, one for each module perhaps: those of letters and dots are found by what they are.

    A dot stands for any character, so they are looked up with the dots that they have, by where these are; but for
    those that are escaped. What is found may match, and all that matches is found.
    """

    def __init__(self, keys: tuple[Any, ...]) -> None:
        self._keys = keys
        self._compiled: dict[Any, Pattern] = {}  # more of them than are kept for all
        self._others: list[int] = []
        self._plain: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for at, key in enumerate(keys):
            plain = key.removeprefix("^").replace(r"\.", _DOT) if isinstance(key, str) and _DOT not in key else ""
            if _PLAIN.fullmatch(plain):
                dots = tuple(number - len(plain) for number, letter in enumerate(plain) if letter == ".")
                own = self._plain.setdefault((-len(plain), *dots), {})
                own.setdefault(plain.replace(_DOT, "."), []).append(at)
            else:
                self._others.append(at)

    def __len__(self) -> int:
        return len(self._keys)

    def pattern(self, key: Any) -> Pattern:
        """The pattern that one of them is. Raises PatternError if it is none."""
        if key not in self._compiled:
            self._compiled[key] = Pattern(key, *_AROUND)
        return self._compiled[key]

    def candidates(self, module: str) -> list[Any]:
        """Those that may match, in their order."""
        found = list(self._others)
        for (start, *dots), keys in self._plain.items():
            if len(module) + start < 0 or (len(module) + start and module[start - 1] != "."):
                continue
            letters = list(module[start:])
            for dot in dots:
                letters[dot] = "."
            found += keys.get("".join(letters), ())
        return [self._keys[at] for at in sorted(found)]


_recent: deque[tuple[Mapping[str, Any], _Keys]] = deque(maxlen=4)
# A config asks for each of its modules; the patterns are kept, so that they are known again by being the same.


def _keys_of(pattern: Mapping[str, Any]) -> _Keys:
    keys = next((keys for one, keys in list(_recent) if one is pattern and len(keys) == len(pattern)), None)
    if keys is None:
        keys = _Keys(tuple(pattern))
        _recent.append((pattern, keys))
    return keys


def unlike(found: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    """Why tensors that are made for a weight of the shape `found` do not fit one of another shape."""
    if found[0] != weight[0]:
        return f"it is made for {found[0]} outputs, the weight has {weight[0]}"
    return f"it is made for {found[1]} inputs, the weight has {weight[1]}" if found[1] != weight[1] else None


def product(up: Any, down: Any, scale: float, out: Any = None) -> Any:
    """s · B A (out, in), the product first; in `out`, if it is given."""
    if math.frexp(scale)[0] == 0.5:
        # A power of two: multiplying B by it gives the same bits and takes no pass over the product.
        return _times(up if scale == 1 else up * scale, down, out)
    found = _times(up, down, out)
    found *= scale
    return found


def _times(up: Any, down: Any, out: Any) -> Any:
    if out is None:
        return up @ down
    import numpy as np

    return np.matmul(up, down, out=out)
