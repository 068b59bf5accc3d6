"""The HTML report, from figures made up here: no model is run."""

from __future__ import annotations

import math
import re
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_tools import NASTY, Page, failing, forward, merged, passing, result, tensors

from fossil_export.verifying._bounds import FLOOR, Distance, ModuleError
from fossil_export.verifying._report import REASONS, WRONG, html
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._weights import TensorCheck


@pytest.mark.parametrize("made", [passing, failing, result], ids=["passing", "failing", "no level"])
def test_page_stands_alone(made: Any) -> None:
    text = html(made())
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "a")
        assert not {"src", "href", "xlink:href", "srcset", "data"} & set(attributes)
    assert not re.search(r"https?:|@import|url\(|@font-face", text)
    assert "prefers-color-scheme: dark" in text


def test_passing_page() -> None:
    text = html(passing())
    page = Page(text)
    assert text.index("<h1>Parity</h1>") < text.index("<svg")
    assert "Not the trained model" not in text and "first outside" not in text and "Wrong tensors" not in text
    assert page.count("rect", "cell") == 30 * 7 + 1 == page.words.count(" survived") - page.words.count("that survived")
    assert page.count("rect", "hit") == 30 * 9 + 2
    for said in ("212", "211", "0.5 0.5 = exact rounding", "4 of 4", "98.2 %", "0.0064", "bfloat16", "rank 16"):
        assert said in page.words
    assert "model.embed_tokens: trainer 0, artifact 0" in page.words
    assert "Every merged tensor (211)" in page.words


def test_failing_page() -> None:
    found = failing()
    text = html(found)
    page = Page(text)
    at = [text.index(part) for part in ("<h1>Not the trained", escape(found.problems[0]), "<li>", "<svg", "Wrong ten")]
    assert at == sorted(at)
    assert "first outside: model.layers.12.self_attn.q_proj" in page.words
    assert page.count("line", "first") == 1
    assert text.count("<li>") == 3


def test_levels_that_did_not_run_are_absent() -> None:
    weights, logits = html(result(tensors=tensors(2))), html(result(forward=forward()))
    assert 'id="survival"' in weights and 'id="modules"' not in weights and "Logits" not in weights
    assert 'id="survival"' not in logits and 'id="modules"' in logits and "<h2>Weights" not in logits
    neither = html(result(problems=("the adapter is for another base",)))
    assert Page(neither).named("svg") == 0 and "the adapter is for another base" in neither
    Page(html(result(tensors=(), forward=forward(modules=(), continuations=0))))


def test_long_lists_end() -> None:
    checks = tuple(merged(f"layers.{index}.fc", 1.0, "is off") for index in range(WRONG + 9))
    text = html(result(tensors=checks, problems=tuple(check.name for check in checks)))
    assert text.count("<li>") == REASONS + 1 and f"and {WRONG + 9 - 1 - REASONS} more" in text
    assert text.count("is off</td>") == WRONG and "<p>and 9 more</p>" in text


def test_names_are_escaped() -> None:
    name = f"model.layers.0.{NASTY}"
    adapter: Any = SimpleNamespace(
        path=NASTY, variant=NASTY, rank=1, base_model=f"{NASTY} bnb-4bit", files=(Path(NASTY),)
    )
    text = html(
        result(
            artifact=Path(f"out/{NASTY}"),
            base=SimpleNamespace(location=NASTY),
            added=Sum.of(adapter),
            device=NASTY,
            problems=(f"{name} is off", NASTY),
            tensors=(
                merged(name, 0.5, NASTY),
                merged(NASTY, 0.5),
                TensorCheck(f"{NASTY}\udcff\x00", "copy", problem="x"),
            ),
            forward=forward(
                device=NASTY, trainer_dtype=NASTY, modules=(ModuleError(name, 0.1, 0.9),), first_outside=name
            ),
        )
    )
    page = Page(text)
    assert NASTY not in text and page.named("b") == 0
    assert f"first outside: {name}" in page.words
    assert text.encode()


def test_figures_that_are_not_numbers() -> None:
    inf, nan = math.inf, math.nan
    odd = [(0.0, 0.0), (inf, inf), (nan, nan), (0.0, inf), (1e-300, 1e300), (1e-3, -1.0)]
    found = Distance(inf, inf, inf, inf, 0.0)
    page = Page(
        html(
            result(
                problems=("all is lost",),
                tensors=(
                    merged("a.0.x", inf, "is off", inf),
                    merged("a.1.x", nan, "is off", nan),
                    merged("a.2.x", -3.0),
                    TensorCheck("a.3.x.weight", "merge", problem="is missing from the artifact"),
                ),
                forward=forward(
                    trainer=found,
                    artifact=found,
                    modules=tuple(ModuleError(f"m{index}", *pair) for index, pair in enumerate(odd)),
                    first_outside="m3",
                ),
            )
        )
    )
    drawn = [value for tag, attributes in page.tags if tag in ("path", "line", "rect") for value in attributes.values()]
    assert not any(re.search(r"\b(nan|inf)\b", value or "") for value in drawn)
    assert "not finite" in page.words and page.count("rect", "none") == 1
    heights = [float(y) for _, shape in page.tags for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", shape.get("d") or "")]
    assert heights and all(0 <= y <= 340 for y in heights)
    Page(html(result(forward=forward(modules=(ModuleError("m", 0.0, FLOOR / 1e30),)))))


def test_large_and_unusual_models() -> None:
    assert Page(html(result(tensors=tensors(80)))).count("rect", "cell") == 80 * 7 + 1
    sides = [merged(f"{side}.block.{n}.q", 0.9) for side in ("encoder", "decoder") for n in range(2)]
    page = Page(html(result(tensors=tuple(sides))))
    assert "encoder.block.*.q" in page.words and "decoder.block.*.q" in page.words
    experts = [merged(f"layers.1.experts.{n}.up", 0.9 - n / 10) for n in range(3)]
    page = Page(html(result(tensors=tuple(experts))))
    assert page.count("rect", "cell") == 1 and "layers.1.experts.2.up: 70.0 % survived, the lowest of 3" in page.words
