"""The HTML report, from figures made up here: no model is run. One test opens it in a real browser."""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import subprocess
import zlib
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from fossil_export.checkpoints.folder import LocalFolder
from fossil_export.storage import Origin
from fossil_export.verifying.forward import FLOOR, Distance, ForwardCheck, ModuleError
from fossil_export.verifying.report import REASONS, WRONG, html
from fossil_export.verifying.verdict import Verification
from fossil_export.verifying.weights import TensorCheck

KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
NASTY = '<b>&"'


def result(**changes: Any) -> Verification:
    found: dict[str, Any] = {
        "origin": Origin("out/merged", LocalFolder(Path("out/merged")), is_path=True),
        "artifact": Path("out/merged"),
        "base": SimpleNamespace(location=Path("models/base")),
        "base_name": "models/base",
        "adapter": SimpleNamespace(
            path=Path("adapters/mine"),
            variant="tile",
            rank=16,
            base_model="models/base",
            files=(Path("adapters/mine/x"),),
        ),
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
    text = html(
        result(
            artifact=Path(f"out/{NASTY}"),
            base=SimpleNamespace(location=NASTY),
            adapter=SimpleNamespace(
                path=NASTY, variant=NASTY, rank=1, base_model=f"{NASTY} bnb-4bit", files=(Path(NASTY),)
            ),
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


def render(folder: Path, text: str) -> tuple[Path, str, str]:
    """The picture of the page, its elements once loaded, and what the browser logged."""
    browser = shutil.which("chromium")
    if browser is None and os.environ.get("CI"):
        pytest.fail("chromium is not on PATH: apt-get install chromium")
    if browser is None:
        pytest.skip("chromium is not on PATH: apt-get install chromium")
    folder.mkdir()
    page, picture = folder / "report.html", folder / "page.png"
    page.write_text(text, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1600", "--enable-logging=stderr", "--v=0"]
    logs, elements = "", ""
    for wanted in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [*command, wanted, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
        )
        elements, logs = done.stdout, logs + done.stderr
    return picture, elements, logs


def pixels(picture: Path) -> list[bytes]:
    """The rows of an 8-bit RGB or RGBA picture, decoded by hand (https://www.w3.org/TR/png-3/#9Filters)."""
    import numpy as np

    content, at, packed, width, channels = picture.read_bytes(), 8, b"", 0, 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, channels = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    raw = zlib.decompress(packed)
    rows: list[bytes] = []
    above = np.zeros((width + 1, channels), np.int32)
    for start in range(0, len(raw), width * channels + 1):
        line = np.zeros((width + 1, channels), np.int32)
        line[1:] = np.frombuffer(raw, np.uint8, width * channels, start + 1).reshape(width, channels)
        if raw[start] == 1:
            line = line.cumsum(axis=0) % 256
        elif raw[start] == 2:
            line = (line + above) % 256
        elif raw[start] in (3, 4):
            for x in range(1, width + 1):
                left, up, corner = line[x - 1], above[x], above[x - 1]
                if raw[start] == 3:
                    line[x] = (line[x] + (left + up) // 2) % 256
                    continue
                a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
                line[x] = (line[x] + np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))) % 256
        above = line
        rows.append(line[1:, :3].astype(np.uint8).tobytes())
    return rows


def colours(rows: list[bytes]) -> set[bytes]:
    return {row[at : at + 3] for row in rows for at in range(0, len(row), 3)}


def test_in_a_browser(tmp_path: Path) -> None:
    pictures = {}
    for name, made in (("passing", passing()), ("failing", failing())):
        picture, elements, logs = render(tmp_path / name, html(made))
        rows = pixels(picture)
        assert (len(rows[0]) // 3, len(rows)) == (1200, 1600)
        assert elements.count("<svg") == 2 and 'id="modules"' in elements and 'id="survival"' in elements
        assert not re.search(r":CONSOLE|Uncaught|Refused|ERR_FILE", logs)
        pictures[name] = rows
    shown = {name: colours(rows) for name, rows in pictures.items()}
    good, bad, artifact, trainer = (bytes.fromhex(code) for code in ("17713f", "b02318", "1c57a0", "e08a1e"))
    amber, blue = bytes.fromhex("f4aa30"), bytes.fromhex("1f4e82")
    assert good in colours(pictures["passing"][:300]) and bad not in shown["passing"]
    assert bad in colours(pictures["failing"][:300]) and good not in shown["failing"]
    for found in shown.values():  # both lines and both ends of the colour scale
        assert {artifact, trainer, amber, blue} <= found
