"""What one verification found, and `fossil_parity.json`: the same in brief, for a model card to quote."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fossil_export._shown import line, table
from fossil_export.checkpoints._checkpoint import Checkpoint, identity, sha256
from fossil_export.checkpoints._jsonfile import write_json
from fossil_export.errors import listed
from fossil_export.storage import Origin
from fossil_export.verifying._bounds import FACTOR, Distance
from fossil_export.verifying._forward import ForwardCheck
from fossil_export.verifying._opening import open_any
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._training import Training
from fossil_export.verifying._weights import TensorCheck
from fossil_export.version import __version__


@dataclass(frozen=True)
class Verification:
    """The verdict on one artifact, as `verify` reaches it.

    Attributes:
        origin: What was verified, as it was named.
        artifact: The folder or file where it lies now.
        base: The base, opened.
        base_name: The base's id on the Hub with its commit, else its path.
        added: The adapters and their weights.
        problems: Empty for parity, else the reasons, the first one first.
        tensors: Every tensor as it was compared; None unless the weights level ran.
        forward: Errors and continuations; None unless the forward level ran.
        device: Where models ran.
        seconds: Wall time.
        warnings: Lines that the user should see.
        training: The base that truth and trainer ran on.
        requantized: The quantized format that the artifact was left in, None for plain floats.
    """

    origin: Origin
    artifact: Path
    base: Checkpoint
    base_name: str
    added: Sum
    problems: tuple[str, ...]
    tensors: tuple[TensorCheck, ...] | None
    forward: ForwardCheck | None
    device: str
    seconds: float
    warnings: tuple[str, ...] = ()
    training: Training = field(default_factory=Training)
    requantized: str | None = None
    """The quantized format that the artifact was left in."""

    def __repr__(self) -> str:
        found = "parity" if self.parity else f"{len(self.problems)} problems, the first: {self.problems[0]}"
        return line("Verification", f"of {self.artifact}: {found}; compared with {self.compared_with}")

    def _repr_html_(self) -> str:
        forward = self.forward
        rows = [
            ("artifact", self.origin.name),
            ("verdict", self.verdict),
            ("compared with", self.compared_with),
            ("base", self.base_name),
            ("tensors", None if self.tensors is None else f"{len(self.tensors)} compared"),
            ("update kept", None if self.survived is None else f"{self.survived:.2%}"),
            ("prompts", None if forward is None else forward.asked),
            ("error, trainer", None if forward is None else f"{forward.trainer.relative_error:.2g}"),
            ("error, artifact", None if forward is None else f"{forward.artifact.relative_error:.2g}"),
            (
                "error, as it runs",
                None if forward is None or forward.as_run is None else f"{forward.as_run.relative_error:.2g}",
            ),
            (
                "continuations",
                None if forward is None else f"{forward.same_continuations} of {forward.continuations} the same",
            ),
            ("device", self.device),
            ("time", f"{self.seconds:.1f} s"),
        ]
        title = "Parity" if self.parity else "NOT the trained model"
        return table(title, rows, [*(f"wrong: {one}" for one in self.problems), *self.warnings], "Notes")

    @property
    def quantized_training(self) -> str | None:
        """What says that training ran over quantized weights, if the trainer of this verification did not: it is the
        adapter on `base` as that is stored."""
        return self.training.doubt

    @property
    def compared_with(self) -> str:
        """What the verdict is about, in words."""
        count = len(self.added.adapters)
        what = "the adapter" if count == 1 else f"the {count} adapters together"
        times = "" if set(self.added.weights) == {1.0} else f", at {_weights(self.added)},"
        return f"{what}{times} on {self.training.base}"

    @property
    def parity(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        """In a few words: "parity" only of what may answer as the trained model does."""
        if not self.parity:
            return "NOT the trained model"
        if self.requantized and self.forward is None:
            return "quantized again as it must be; its answers were not compared"
        return "parity"

    @property
    def survived(self) -> float | None:
        """The share of the update that is in the weights, if they were compared."""
        update = sum(check.update for check in self.tensors or ())
        return sum(check.kept for check in self.tensors or ()) / update if update else None

    def to_dict(self) -> dict[str, Any]:
        """Every figure, as `--json` prints it; infinite errors are None."""
        return {
            **certificate(self),
            "seconds": round(self.seconds, 3),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "tensors": None if self.tensors is None else [_tensor(check) for check in self.tensors],
            "modules": None
            if self.forward is None
            else [
                {"module": error.module, "trainer": finite(error.trainer), "artifact": finite(error.artifact)}
                for error in self.forward.modules
            ],
        }


def certificate(result: Verification) -> dict[str, Any]:
    """The compact record: verdict, figures, versions, device, hashes; for a model card to quote."""
    found: dict[str, Any] = {
        "format": 1,
        "tool": {"name": "fossil-export", "version": __version__},
        "parity": result.parity,
        "reason": result.problems[0] if result.problems else None,
        **_adapters(result.added),
        "base": result.base_name,
        "base_weights": result.training.base_weights,
        **({"trained_on": result.training.seen.record()} if result.training.seen.how is not None else {}),
        **({"into": "original"} if result.training.is_other else {}),
        **({"requantized": result.requantized} if result.requantized else {}),
        "quantized_training": result.quantized_training,
        "device": result.device,
        "versions": versions(),
        "weights": None,
        "forward": None,
    }
    if result.tensors is not None:
        merged = [check for check in result.tensors if check.action == "merge"]
        again = sum(check.action == "requantize" for check in result.tensors)
        found["weights"] = {
            "tensors": len(result.tensors),
            "merged": len(merged),
            **({"requantized": again} if result.requantized else {}),
            "wrong": sum(check.problem is not None for check in result.tensors),
            "worst_error_in_steps": finite(max((check.worst for check in merged), default=0.0)),
            "elements_off": sum(check.off for check in result.tensors),
            "update_survived": None if result.survived is None else finite(result.survived),
        }
    if result.forward is not None:
        forward = result.forward
        found["forward"] = {
            "prompts": forward.prompts,
            "added_prompts": forward.added_prompts,
            "truth": forward.truth_dtype,
            "trainer": {"dtype": forward.trainer_dtype, **_distance(forward.trainer)},
            "artifact": _distance(forward.artifact),
            **({"as_it_runs": _distance(forward.as_run)} if forward.as_run is not None else {}),
            "allowed_factor": FACTOR,
            "allowed_noise": forward.noise,
            "same_continuations": [forward.same_continuations, forward.continuations],
            "first_module_outside": forward.first_outside,
        }
    return found


def _weights(added: Sum) -> str:
    word = "weight" if len(added.weights) == 1 else "weights"
    return f"{word} {listed([f'{weight:g}' for weight in added.weights], len(added.weights))}"


def _adapters(added: Sum) -> dict[str, Any]:
    """What a record has of them: "adapter" for one, "adapters" for several."""
    found = [
        {"name": adapter.name, "revision": adapter.revision, "variant": adapter.variant, "rank": adapter.rank}
        | ({} if added.is_plain else {"weight": weight})
        for adapter, weight in added
    ]
    return {"adapter": found[0]} if len(found) == 1 else {"adapters": found}


def certificate_file(result: Verification) -> bytes:
    """`fossil_parity.json`: the certificate, and which files it was about."""
    return write_json({**certificate(result), "hashes": _hashes(result)})


def _hashes(result: Verification) -> dict[str, Any]:
    """The adapter's digests, sizes and header digests of artifact and base."""
    return {
        "artifact": open_any(result.artifact).hashes(),
        "base": identity(result.base),
        "adapter": [{"file": path.name, "sha256": sha256(path)} for one in result.added.adapters for path in one.files],
    }


def versions() -> dict[str, str]:
    """Of the packages that had a part in it."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "torch", "transformers", "peft", "onnxruntime-gpu", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """ "cpu (x86_64, 2 cores)" or the GPU's own name."""
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {os.cpu_count()} cores)"


def finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if value == value and abs(value) != float("inf") else None


def _distance(found: Distance) -> dict[str, float | None]:
    return {
        "relative_error": finite(found.relative_error),
        "worst_tenth": finite(found.worst_tenth),
        "max_abs_difference": finite(found.max_abs_difference),
        "kl": finite(found.kl),
        "top1": found.top1,
    }


def _tensor(check: TensorCheck) -> dict[str, Any]:
    return {
        "tensor": check.name,
        "action": check.action,
        "module": check.module,
        "worst_error_in_steps": finite(check.worst),
        "elements_off": check.off,
        "elements": check.elements,
        "survived": finite(check.survived) if check.survived is not None else None,
        "problem": check.problem,
    }
