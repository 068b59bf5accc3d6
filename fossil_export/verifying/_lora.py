"""LoRA folders: the matrices held against what was trained, and the folder run by PEFT as a server would take it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._patterns import pattern_of
from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint, sha256
from fossil_export.checkpoints._dtypes import element_count, numpy_dtype
from fossil_export.checkpoints._header import TensorInfo, read_header
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import AdapterError, listed
from fossil_export.merging._onto import plan_onto
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import settled
from fossil_export.verifying._folder import check_record
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens, TorchRunner, open_lora
from fossil_export.verifying._nearest import Nearest, far_from
from fossil_export.verifying._stored import stored_dtype
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck
from fossil_export.verifying.reference import EXACT
from fossil_export.writing._scratch import Scratch

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

_PREFIX = "base_model.model."


def refuse_imports(folder: Path) -> None:
    """Raise AdapterError where the config has settings by which PEFT imports a module or reads other files."""
    config = read_json(folder / "adapter_config.json", AdapterError)
    if found := sorted(name for name, value in config.items() if name.endswith("_config") and value):
        raise AdapterError(
            f"{folder / 'adapter_config.json'}: sets {listed(found)}, which may name modules or files that PEFT loads "
            "and no converted LoRA has; take it out"
        )


@dataclass
class LoraFolder:
    """A PEFT LoRA folder and the base it is for."""

    folder: Path
    _plan: MergePlan | None = None
    _described: Scratch | None = field(default=None, repr=False)

    def weights(
        self, base: Checkpoint, added: Sum, record: Mapping[str, Any] | None
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        adapter = added.only
        self._plan = settled(plan_onto(base, added.adapters, added.weights))
        return None, [*check_record(base, [adapter], record), *_check(self.folder, adapter, self._plan)]

    def incomparable(self) -> str | None:
        return None

    def runnable(self) -> AbstractContextManager[LoraFolder]:
        return nullcontext(self)

    def subject(self, base: Checkpoint, added: Sum, device: str) -> Subject:
        plan = self._plan or settled(plan_onto(base, [added.only], added.weights))
        described = base.location
        if plan.config is not None:  # the task's own config, as a merge would write it
            self._described = Scratch()
            described = self._described.path
            (described / "config.json").write_bytes(plan.config)
            for name, path in plan.companions.items():
                if "/" not in name and name != "config.json":
                    (described / name).write_bytes(path.read_bytes())

        def open_it() -> TorchRunner:
            return open_lora(self.folder, base.location, described, stored_dtype(base), device)

        return Subject(described, open_it)

    def dtype(self, base: Checkpoint) -> str:
        return stored_dtype(base)

    def parameters(self, base: Checkpoint) -> int:
        return sum(element_count(tensor.shape) for tensor in base.tensors.values())

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        return []

    def hashes(self) -> list[dict[str, Any]]:
        paths = [self.folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        return [{"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)} for path in paths]


def _check(folder: Path, adapter: Adapter, plan: MergePlan) -> Iterator[str]:
    """Every A and B is what the method's own formula says; all else is carried as it is."""
    header = read_header(folder / "adapter_model.safetensors", AdapterError)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    config = read_json(folder / "adapter_config.json", AdapterError)
    if config.get("use_dora"):
        yield "adapter_config.json sets use_dora; its update would be scaled"
    for name in ("fan_in_fan_out", "layers_to_transform", "exclude_modules"):
        if config.get(name):
            yield f"adapter_config.json sets {name}, which changes what the matrices mean"
    owners = [trained.owner for trained in adapter.trained.values()]
    targets = config.get("target_modules")
    if isinstance(targets, list):
        bare = [m for m in owners if not any(m == target or m.endswith(f".{target}") for target in targets)]
        if bare:
            yield f"target_modules does not cover {listed(bare)}"
    elif not isinstance(targets, str) and owners:
        yield "adapter_config.json names no target_modules; PEFT would take those it has for such models"
    wanted = {
        f"{_PREFIX}{trained.owner}.{ending}": name
        for name, trained in adapter.trained.items()
        for ending in _endings(trained, tensors)
    }
    if bool(config.get("lora_bias")) != any(name.endswith(".lora_B.bias") for name in wanted):
        yield f"adapter_config.json says lora_bias {config.get('lora_bias')}, and its tensors say otherwise"
    if extra := sorted(set(tensors) - set(wanted) - {info.name for info in adapter.saved.values()}):
        yield f"holds {listed(extra)}, which the adapter does not"
    sizes = {module: matrix.shape for module, matrix in plan.matrices.items()}
    for info in adapter.saved.values():
        found = tensors.get(info.name)
        if found is None or not np.array_equal(adapter.array(found), adapter.array(info)):
            yield f"{info.name} is not the trained one"
    cut: list[str] = []
    scaled: list[str] = []
    unlike: dict[str, Nearest] = {}
    for module, trained in adapter.trained.items():
        names = [f"{_PREFIX}{trained.owner}.{ending}" for ending in _endings(trained, tensors)]
        if any(name not in tensors for name in names):
            yield f"{module} has no {' and '.join(name.removeprefix(f'{_PREFIX}{trained.owner}.') for name in names)}"
            continue
        ours = [tensors[name] for name in names]
        try:
            problem, off_by = _module(trained, adapter, ours, sizes[module], config)
        except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
            yield f"adapter_config.json does not tell the scale of {module}: {error}"
            continue
        if problem == _CUT:
            cut.append(module)
        elif problem == _FULL:
            unlike[module] = Nearest(ours, _scale(config, trained.owner, adapter.array(ours[0]).shape[0]))
        elif off_by is not None:
            scaled.append(module)
        elif problem is not None:
            yield f"{module}: {problem}"
    if scaled:
        said = f"r {config.get('r')} and lora_alpha {config.get('lora_alpha')}"
        yield f"adapter_config.json says {said}; its update would be scaled, that of {listed(scaled)}"
    if cut:
        yield f"{listed(cut)} were {_CUT}"
    if unlike and (far := far_from(adapter, plan, unlike)):
        how = "+".join(dict.fromkeys(adapter.trained[module].method for module in far))
        yield (
            f"{listed(list(far))} are off, by up to {max(far.values()):.2g} of what was trained ({how}), as the "
            "nearest LoRA is; --level forward says what that does to the logits"
        )


_CUT = "cut to a smaller rank than was trained"
_FULL = "is not of the low rank of a LoRA"


def _module(
    trained: Trained, adapter: Adapter, found: list[TensorInfo], weight: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[str | None, float | None]:
    """What is wrong with the tensors of a module, and the number by which all of its update is off, if it is one."""
    arrays, rank = [adapter.array(info) for info in found], None
    if len(arrays) == 2:
        rank = len(arrays[0]) if arrays[0].ndim else 0
        if not _fits(arrays, weight, found[0].name.endswith("embedding_A")):
            return f"its matrices {list(arrays[1].shape)} and {list(arrays[0].shape)} do not fit {list(weight)}", None
        if rank != _of(config, "rank_pattern", trained.owner, config.get("r")):
            return f"has rank {rank}, and adapter_config.json says otherwise", None
        own = trained.rank if trained.method in _OWN else trained.form_rank
        if own is not None and rank < own:
            return _CUT, None
    return _matrices(trained, adapter, arrays, [info.dtype for info in found], _scale(config, trained.owner, rank))


_OWN = ("lora", "lora_embedding")
# Whose A and B are LoRA's own.


def _endings(trained: Trained, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """How the tensors are called that a trained entry becomes."""
    if trained.dimensions == 1:
        return ("lora_B.bias",)
    embedding = ("lora_embedding_A", "lora_embedding_B")
    is_one = trained.method == "lora_embedding" or f"{_PREFIX}{trained.owner}.{embedding[0]}" in tensors
    return embedding if is_one else ("lora_A.weight", "lora_B.weight")


def _fits(arrays: list[Array], weight: tuple[int, ...], embedding: bool) -> bool:
    """Whether A (r, in) and B (out, r), a convolution's flattened, are of a weight (out, in)."""
    first, second = arrays
    if second.ndim < 2 or first.ndim < 2 or second.shape[1] != len(first) or (embedding and len(first.shape) != 2):
        return False
    size = (len(second), element_count(first.shape[1:]))
    return (size[::-1] if embedding else size) == tuple(weight)


def _of(config: Mapping[str, Any], pattern: str, module: str, otherwise: Any) -> Any:
    """What a pattern of the config says of a module (`get_pattern_key` in peft/utils/other.py)."""
    for key, value in (config.get(pattern) or {}).items():
        if pattern_of(key, r"(.*\.)?(", ")$").match(module) is not None:
            return value
    return otherwise


def _scale(config: Mapping[str, Any], module: str, rank: int | None) -> float:
    """By what PEFT multiplies B A (`update_layer` in peft/tuners/lora/layer.py)."""
    own = rank or int(_of(config, "rank_pattern", module, config["r"]))
    alpha = float(_of(config, "alpha_pattern", module, config["lora_alpha"]))
    return alpha / math.sqrt(own) if config.get("use_rslora") else alpha / own


def _matrices(
    trained: Trained, adapter: Adapter, found: list[Array], dtypes: list[str], scale: float
) -> tuple[str | None, float | None]:
    """The same of A (r, in) and B (out, r), or c (out); of a method that is no LoRA, only that it is none."""
    arrays = {role: np.asarray(array, np.float64) for role, array in adapter.arrays(trained.module).items()}
    wanted = _wanted(trained, arrays, found)
    if wanted is None:
        return _FULL, None
    if len(found) == 2 and not _rounded_to(found[0], wanted[0], dtypes[0]):
        return f"its lora_A does not sum the inputs as {trained.method} does", None
    last, exact = np.asarray(found[-1], np.float64), wanted[-1]
    if scale and _rounded_to(last, exact / scale, dtypes[-1]):
        return None, None
    norm = float(np.square(exact).sum())
    ratio = float((last * exact).sum()) * scale / norm if norm else 0.0
    off_by = ratio if ratio and scale and _rounded_to(last, exact * ratio / scale, dtypes[-1]) else None
    return ("its lora_B is not the trained shard" if len(found) == 2 else "is not the trained bias"), off_by


def _wanted(trained: Trained, arrays: Mapping[str, Array], found: list[Array]) -> list[Array] | None:
    """A and B · s, or c · s, in float64, as PEFT stores them; None if the method has none."""
    scale = trained.numbers.get("scale", 1.0)
    if trained.method == "lora_bias":
        return [arrays["c"] * scale]
    if trained.method in _OWN:
        return [arrays["A"], arrays["B"] * scale]
    exactly = EXACT[trained.method]
    embedding = found[0].shape[1] if len(found) == 2 else 0
    up = exactly.up(exactly.part(arrays, 0, len(found[-1])), trained.numbers)
    down = exactly.down(arrays, trained.numbers, embedding)
    return None if up is None or down is None else [np.asarray(down, np.float64), np.asarray(up, np.float64)]


def _rounded_to(found: Array, exact: Array, dtype: str) -> bool:
    """Whether each value is the exact one, rounded once to the dtype."""
    if found.shape != exact.shape:
        return False
    spread, kind = np.abs(exact) * 2.0**-50, numpy_dtype(dtype)  # of float64's own arithmetic
    with np.errstate(over="ignore"):
        low, high = (exact - spread).astype(kind), (exact + spread).astype(kind)
    return bool(((low <= found) & (found <= high)).all())
