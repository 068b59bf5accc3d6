"""LoRA folders: the matrices held against the shards, and the folder run by PEFT as a server would take it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.adapters import Adapter, Trained
from fossil_export.checkpoints._checkpoint import Checkpoint, sha256
from fossil_export.checkpoints._dtypes import element_count
from fossil_export.checkpoints._header import read_header
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import AdapterError, listed
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge, settled
from fossil_export.verifying._folder import check_record
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens, TorchRunner, open_lora
from fossil_export.verifying._stored import stored_dtype
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck
from fossil_export.verifying.reference import EXACT

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
    _described: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def weights(
        self, base: Checkpoint, added: Sum, record: Mapping[str, Any] | None, progress: Any
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        adapter = added.only
        self._plan = settled(plan_merge(adapter, base.location))
        return None, [*check_record(base, [adapter], record), *_check(self.folder, adapter, self._plan)]

    def incomparable(self) -> str | None:
        return None

    def subject(self, base: Checkpoint, added: Sum, device: str) -> Subject:
        plan = self._plan or settled(plan_merge(added.only, base.location))
        described = base.location
        if plan.config is not None:  # the task's own config, as a merge would write it
            self._described = tempfile.TemporaryDirectory()
            described = Path(self._described.name)
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
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank != alpha or config.get("use_rslora") or config.get("use_dora"):
        yield f"adapter_config.json says r {rank} and lora_alpha {alpha}; its update would be scaled"
    for name in ("alpha_pattern", "rank_pattern", "fan_in_fan_out", "layers_to_transform", "exclude_modules"):
        if config.get(name):
            yield f"adapter_config.json sets {name}, which changes what the matrices mean"
    targets = config.get("target_modules")
    if isinstance(targets, list):
        bare = [m for m in adapter.trained if not any(m == target or m.endswith(f".{target}") for target in targets)]
        if bare:
            yield f"target_modules does not cover {listed(bare)}"
    wanted_names = {f"{_PREFIX}{m}.lora_{part}.weight" for m in adapter.trained for part in "AB"}
    if extra := sorted(set(tensors) - wanted_names - {info.name for info in adapter.saved.values()}):
        yield f"holds {listed(extra)}, which the adapter does not"
    sizes = {module: matrix.shape for module, matrix in plan.matrices.items()}
    for info in adapter.saved.values():
        found = tensors.get(info.name)
        if found is None or not np.array_equal(adapter.array(found), adapter.array(info)):
            yield f"{info.name} is not the trained one"
    for module, trained in adapter.trained.items():
        first = tensors.get(f"{_PREFIX}{module}.lora_A.weight")
        second = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        if first is None or second is None:
            yield f"{module} has no lora_A and lora_B"
        elif (second.shape[0], first.shape[1]) != sizes[module] or first.shape[0] != second.shape[1]:
            fit = f"do not fit {list(sizes[module])}"
            yield f"{module}: its matrices {list(second.shape)} and {list(first.shape)} {fit}"
        else:
            yield from _matrices(trained, adapter, adapter.array(first), adapter.array(second))


def _matrices(trained: Trained, adapter: Adapter, first: Array, second: Array) -> Iterator[str]:
    """A (r, in) and B (out, r) against what they must be; of a method that is no LoRA, they must be something."""
    exactly, module = EXACT[trained.method], trained.module
    arrays = adapter.arrays(module)
    up = exactly.up(exactly.part(arrays, 0, len(second)), trained.numbers)
    down = exactly.down(arrays, trained.numbers, first.shape[1])
    if up is None or down is None:
        if not first.any() or not second.any():
            yield f"{module}: its matrices are zero"
    elif not np.array_equal(first, down.astype(first.dtype)):
        yield f"{module}: its lora_A does not sum the inputs as {trained.method} does"
    elif not np.array_equal(second, up.astype(second.dtype)):
        yield f"{module}: its lora_B is not the trained shard"
