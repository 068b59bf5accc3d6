"""The kinds of artifact that can be verified, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fossil_export.adapters import Adapter
from fossil_export.adapters.peft import WEIGHTS
from fossil_export.checkpoints.checkpoint import Checkpoint, identity, open_checkpoint, sha256
from fossil_export.checkpoints.dtypes import element_count
from fossil_export.errors import CheckpointError
from fossil_export.merging.plan import plan_merge
from fossil_export.verifying.folder import check_folder, check_record
from fossil_export.verifying.forward import Subject
from fossil_export.verifying.lora import LoraFolder, is_lora, refuse_imports
from fossil_export.verifying.models import Tokens, open_artifact
from fossil_export.verifying.stored import stored_dtype
from fossil_export.verifying.weights import TensorCheck, check_weights

Progress = Callable[[int], None]


class Artifact(Protocol):
    """What `verify` asks of an artifact. A new kind is a new class here and an entry in `open_any`."""

    def weights(
        self, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, progress: Progress
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        """The weights level: the tensors as compared (None where they are no checkpoint's) and what is wrong."""

    def incomparable(self) -> str | None:
        """Why the weights level alone would say nothing; None where it compares something."""

    def subject(self, base: Checkpoint, adapter: Adapter, device: str) -> Subject:
        """How to run it."""

    def dtype(self, base: Checkpoint) -> str:
        """The dtype the trainer is run in."""

    def parameters(self, base: Checkpoint) -> int:
        """Roughly how many values it has."""

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        """What is wrong beyond the logits, found by running it once more."""

    def hashes(self) -> list[dict[str, Any]]:
        """Which files it is."""


@dataclass(frozen=True)
class MergedFolder:
    """A checkpoint of merged weights."""

    folder: Path
    checkpoint: Checkpoint

    def weights(
        self, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, progress: Progress
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        dtype = (record or {}).get("dtype", "auto")
        plan = plan_merge(adapter, base.location, dtype=dtype).settled()
        problems = list(check_folder(self.checkpoint, base, adapter, record, plan))
        tensors = check_weights(self.checkpoint, base, adapter, dtype, progress)
        return tensors, problems + [f"{check.name} {check.problem}" for check in tensors if check.problem]

    def incomparable(self) -> str | None:
        return None

    def subject(self, base: Checkpoint, adapter: Adapter, device: str) -> Subject:
        return Subject(self.folder, lambda: open_artifact(self.folder, device))

    def dtype(self, base: Checkpoint) -> str:
        return stored_dtype(base)

    def parameters(self, base: Checkpoint) -> int:
        return _count(self.checkpoint)

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        return []

    def hashes(self) -> list[dict[str, Any]]:
        return identity(self.checkpoint)


@dataclass(frozen=True)
class OnnxFolder:
    """A graph with its data, configs and, if it takes adapters, an adapter file."""

    folder: Path

    def weights(
        self, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, progress: Progress
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        from fossil_export.verifying.shards import check_shards

        plan_merge(adapter, base.location)  # do they go together?
        return None, [*check_record(base, adapter, record), *check_shards(self.folder, adapter)]

    def incomparable(self) -> str | None:
        from fossil_export.verifying.quantized import is_quantized

        if self._mode() == "swappable" or (self._mode() == "fused" and is_quantized(self.folder)):
            return None
        return f"a {self._mode()} graph has no shards of its own; it is checked by running it, with --level forward"

    def subject(self, base: Checkpoint, adapter: Adapter, device: str) -> Subject:
        from fossil_export.verifying.onnx_models import OnnxRunner, providers
        from fossil_export.verifying.quantized import NOISE, is_quantized, take_weights

        providers(device)
        if not is_quantized(self.folder):
            return Subject(self.folder, lambda: OnnxRunner(self.folder, device))
        merged = self._mode() == "merged"

        problems: list[str] = []

        def change(network: Any) -> None:
            problems[:] = take_weights(network, self.folder, check=merged)

        return Subject(self.folder, lambda: OnnxRunner(self.folder, device), NOISE, change, merged, problems)

    def dtype(self, base: Checkpoint) -> str:
        from fossil_export.onnx.builders.existing import find_graph
        from fossil_export.onnx.graph.file import load_graph

        found = [
            value.dtype.name
            for node in load_graph(find_graph(self.folder)).graph
            if node.op_type in ("MatMul", "Gemm", "MatMulNBits") and "/tiled/" not in str(node.name)
            for value in node.outputs
            if value.dtype is not None
        ]
        names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
        return names.get(max(set(found), key=found.count), "float32") if found else "float32"

    def parameters(self, base: Checkpoint) -> int:
        return _count(base)

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        """Swapping the adapter out gives the base's answers to the bit, before and after it was in."""
        import torch

        from fossil_export.verifying.onnx_models import OnnxRunner

        runner = OnnxRunner(self.folder, device)
        try:
            if not runner.swaps:
                return []
            answers = []
            for active in (False, True, False):
                runner.active = active
                answers.append([runner.logits(ids) for ids in tokens])
        finally:
            runner.close()
        before, within, after = answers
        if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            return ["with the adapter swapped out the graph does not answer as it did before"]
        if all(torch.equal(one, other) for one, other in zip(before, within, strict=True)):
            return ["with the adapter swapped in the graph answers as without it"]
        return []

    def hashes(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("*.onnx*")):
            entry: dict[str, Any] = {"file": path.name, "size": path.stat().st_size}
            if path.suffix in (".onnx", ".onnx_adapter"):
                entry["sha256"] = sha256(path)
            found.append(entry)
        return found

    def _mode(self) -> str:
        from fossil_export.onnx.builders.existing import find_graph
        from fossil_export.onnx.signature import read_mark

        return str(read_mark(find_graph(self.folder)).get("mode", "merged"))


def open_any(folder: Path) -> Artifact:
    """The artifact in a folder: a graph, a LoRA, else a checkpoint. Raises CheckpointError, also for what is none."""
    if any(folder.glob("*.onnx")):
        from fossil_export.onnx.builders.existing import refuse_libraries

        refuse_libraries(folder)
        return OnnxFolder(folder)
    if is_lora(folder):
        refuse_imports(folder)
        return LoraFolder(folder)
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names and names & set(WEIGHTS):
        raise CheckpointError(f"{folder}: is the trained adapter itself; merge or convert it, and verify the result")
    if any(name.endswith(".gguf") for name in names) and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder}: holds GGUF files, which are not verified; verify the LoRA of --to lora")
    return MergedFolder(folder, open_checkpoint(folder))


def _count(checkpoint: Checkpoint) -> int:
    return sum(element_count(tensor.shape) for tensor in checkpoint.tensors.values())
