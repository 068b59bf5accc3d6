"""ONNX folders: the shards that a graph holds, and the graph run by its own runtime."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._checkpoint import Checkpoint, sha256
from fossil_export.merging._onto import plan_onto
from fossil_export.verifying._artifacts import count_parameters
from fossil_export.verifying._folder import check_record
from fossil_export.verifying._forward import Subject
from fossil_export.verifying._models import Tokens
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OnnxFolder:
    """A graph with its data, configs and, if it takes adapters, an adapter file."""

    folder: Path

    def weights(
        self, base: Checkpoint, added: Sum, record: Mapping[str, Any] | None
    ) -> tuple[tuple[TensorCheck, ...] | None, list[str]]:
        from fossil_export.verifying._shards import check_shards

        adapter = added.only
        plan_onto(base, [adapter], added.weights)  # do they go together?
        return None, [*check_record(base, [adapter], record), *check_shards(self.folder, adapter)]

    def incomparable(self) -> str | None:
        from fossil_export.verifying._quantized import is_quantized
        from fossil_export.verifying._shards import has_pairs

        mode = self._mode()
        if mode == "swappable" or (mode == "fused" and (has_pairs(self.folder) or is_quantized(self.folder))):
            return None
        return f"a {mode} graph has no shards of its own; it is checked by running it, with --level forward"

    def runnable(self) -> AbstractContextManager[OnnxFolder]:
        return nullcontext(self)

    def subject(self, base: Checkpoint, added: Sum, device: str) -> Subject:
        from fossil_export.verifying._onnx_models import OnnxRunner, providers
        from fossil_export.verifying._quantized import NOISE, Codes, is_quantized

        providers(device)
        if not is_quantized(self.folder):
            return Subject(self.folder, lambda: OnnxRunner(self.folder, device))
        merged = self._mode() == "merged"
        codes = Codes(self.folder, device, merged)
        return Subject(
            self.folder,
            lambda: OnnxRunner(self.folder, device),
            NOISE,
            codes.give,
            merged,
            codes.problems,
            codes.exact,
        )

    def dtype(self, base: Checkpoint) -> str:
        from fossil_export.onnx.builders._existing import find_graph
        from fossil_export.onnx.graph._file import load_graph

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
        return count_parameters(base)

    def afterwards(self, tokens: list[Tokens], device: str) -> list[str]:
        """Swapping the adapter out gives the base's answers to the bit, before and after it was in."""
        answers = self._swapped(tokens, device, (False, True, False))
        if answers is None:
            return []
        before, within, after = answers
        if not _same(before, after):
            return ["with the adapter swapped out the graph does not answer as it did before"]
        # Products of 8 bits may hide what little an adapter changes.
        if _same(before, within) and _same(*(self._swapped(tokens, device, (False, True), exact=True) or ([], []))):
            return ["with the adapter swapped in the graph answers as without it"]
        return []

    def _swapped(
        self, tokens: list[Tokens], device: str, states: tuple[bool, ...], exact: bool = False
    ) -> list[list[torch.Tensor]] | None:
        """The answers with the adapter in or out; None if the graph has none to swap."""
        from fossil_export.verifying._onnx_models import OnnxRunner

        runner = OnnxRunner(self.folder, device, exact)
        try:
            if not runner.swaps:
                return None
            answers = []
            for runner.active in states:
                answers.append([runner.logits(ids) for ids in tokens])
            return answers
        finally:
            runner.close()

    def hashes(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("*.onnx*")):
            entry: dict[str, Any] = {"file": path.name, "size": path.stat().st_size}
            if path.suffix in (".onnx", ".onnx_adapter"):
                entry["sha256"] = sha256(path)
            found.append(entry)
        return found

    def _mode(self) -> str:
        from fossil_export.onnx._signature import read_mark
        from fossil_export.onnx.builders._existing import find_graph

        return str(read_mark(find_graph(self.folder)).get("mode", "merged"))


def _same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    import torch

    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
