"""Results of verification, made up, and a reader of the page."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.storage import Origin
from fossil_export.verifying._bounds import Distance, ModuleError
from fossil_export.verifying._forward import ForwardCheck
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._verdict import Verification
from fossil_export.verifying._weights import TensorCheck

KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
NASTY = '<b>&"'


ADAPTER: Any = SimpleNamespace(
    path=Path("adapters/mine"), variant="tile", rank=16, base_model="models/base", files=(Path("adapters/mine/x"),)
)


def result(**changes: Any) -> Verification:
    found: dict[str, Any] = {
        "origin": Origin("out/merged", LocalFolder(Path("out/merged")), is_path=True),
        "artifact": Path("out/merged"),
        "base": SimpleNamespace(location=Path("models/base")),
        "base_name": "models/base",
        "added": Sum.of(ADAPTER),
        "problems": (),
        "tensors": None,
        "forward": None,
        "device": "cpu (x86_64, 2 cores)",
        "seconds": 12.3,
    }
    return Verification(**{**found, **changes})


def merged(name: str, survived: float, problem: str | None = None, worst: float = 0.5) -> TensorCheck:
    off = 7 if problem else 0
    return TensorCheck(f"{name}.weight", "merge", name, 4096, worst, off, 2.0 * survived, 2.0, problem)


def tensors(layers: int) -> tuple[TensorCheck, ...]:
    """Survival falls from 1 in the first layer's first kind to 0.4 in the last one's last."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    checks = [merged(name, 1 - 0.6 * (index / len(names)) ** 3) for index, name in enumerate(names)]
    return TensorCheck("model.embed_tokens.weight", "copy", elements=64), *checks, merged("lm_head", 0.93)


def modules(layers: int, fault: int | None = None) -> tuple[ModuleError, ...]:
    """In the order they run; from layer `fault` on the artifact is far off."""
    found = [ModuleError("model.embed_tokens", 0.0, 0.0)]
    for layer in range(layers):
        for index, kind in enumerate([*KINDS, "post_attention_layernorm", "mlp"]):
            error = 1e-3 * (1 + layer) ** 0.6 * (1 + 0.5 * math.sin(7.0 * index + layer))
            wrong = 60.0 if fault is not None and layer >= fault else 1.1
            found.append(ModuleError(f"model.layers.{layer}.{kind}", error, error * wrong))
    return (*found, ModuleError("lm_head", 4e-3, 0.3 if fault is not None else 4.4e-3))


def forward(**changes: Any) -> ForwardCheck:
    found: dict[str, Any] = {
        "prompts": 8,
        "truth_dtype": "float64",
        "trainer_dtype": "bfloat16",
        "device": "cpu",
        "trainer": Distance(0.0061, 0.0102, 0.3, 2.1e-4, 0.985),
        "artifact": Distance(0.0064, 0.0099, 0.3, 2.2e-4, 0.982),
        "same_continuations": 4,
        "continuations": 4,
        "modules": modules(30),
        "first_outside": None,
        "problem": None,
    }
    return ForwardCheck(**{**found, **changes})


def passing() -> Verification:
    return result(tensors=tensors(30), forward=forward())


def failing() -> Verification:
    wrong = "7 of 4096 elements are off, the first at [3, 5], worst by 41.2 steps of BF16"
    bad = [merged(f"model.layers.{layer}.self_attn.q_proj", 0.31, wrong, 41.2) for layer in range(12, 15)]
    names = {check.name for check in bad}
    checks = (*(check for check in tensors(30) if check.name not in names), *bad)
    first = "model.layers.12.self_attn.q_proj"
    problem = f"the logits of the median position are 0.31 from the truth, the trainer's 0.0061, first at {first}"
    far = Distance(0.31, 0.44, 9.1, 0.52, 0.61)
    return result(
        problems=(*(f"{check.name} {wrong}" for check in bad), problem),
        tensors=checks,
        forward=forward(
            artifact=far, modules=modules(30, 12), first_outside=first, problem=problem, same_continuations=0
        ),
    )


class Page(HTMLParser):
    """Checks that every tag is closed and collects what there is; void tags are written <tag/>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open
        root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
        assert root.tag == "html"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.open[-1:] != ["style"] else ""

    def count(self, tag: str, kind: str = "") -> int:
        return sum(name == tag and kind in (attributes.get("class") or "").split() for name, attributes in self.tags)

    def named(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)
