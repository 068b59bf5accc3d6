"""The generated section of a model card, and the warnings that go with it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from card_tools import (
    ADAPTER,
    ADAPTER_REVISION,
    BASE,
    CERTIFICATE,
    LOCAL,
    QUICK,
    RECORD,
    REVISION,
    TEMPLATE_FILLER,
    facts,
    generated,
    local,
    metadata,
    snippets,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards import END, model_card, warnings


def test_certificate_is_quoted() -> None:
    part = generated(model_card(facts()))
    for line in (
        "| Verdict | parity |",
        "| Weights | 272 tensors, 210 merged, 0 wrong |",
        "| Worst error | 0.5000 steps of the dtype (0.5 is exact rounding) |",
        "| Trainer | 3.47e-02 from the truth, KL 1.4e-02, top-1 97.7% (bfloat16) |",
        "| This model | 2.89e-02 from the truth, KL 1.4e-02, top-1 97.7% |",
        "| Same continuations | 3 of 4 (16 prompts, truth in float64) |",
        "| Device | cpu (x86_64, 2 cores) |",
        "| Versions | torch 2.13.0, transformers 5.23.0, peft 0.21.2 |",
        "| Trained parameters | 9,830,400 |",
        "| Dtype | bfloat16 |",
    ):
        assert line in part.splitlines()
    assert "99.3% of the trained update" in part and "little" not in part
    assert f"[{BASE}](https://huggingface.co/{BASE}/tree/{REVISION})" in part
    assert f"[{ADAPTER}](https://huggingface.co/{ADAPTER}/tree/{ADAPTER_REVISION})" in part
    assert "2409.15371" in part


def test_a_graph_that_rounds_as_it_runs_is_quoted_both_ways() -> None:
    as_run = {"relative_error": 0.0612, "kl": 0.106, "top1": 0.899}
    forward = {**CERTIFICATE["forward"], "as_it_runs": as_run, "prompts": 18, "added_prompts": 16}
    part = generated(model_card(facts(certificate={**CERTIFICATE, "forward": forward}))).splitlines()
    exact = "2.89e-02 from the truth, KL 1.4e-02, top-1 97.7%"
    assert f"| This model | {exact} (products in full precision) |" in part
    assert "| As it runs | 6.12e-02 from the truth, KL 1.1e-01, top-1 89.9% (products of 8 bits) |" in part
    assert "| Same continuations | 3 of 4 (18 prompts, 16 of them built-in, truth in float64) |" in part


@pytest.mark.parametrize("certificate", [None, {}, {"parity": "yes"}])
def test_unverified_and_broken_certificates(certificate: dict[str, Any] | None) -> None:
    assert "It was not verified" in model_card(facts(certificate=certificate))
    assert any("fossil-export verify" in line for line in warnings(facts(certificate=certificate)))


def test_figures_that_are_missing() -> None:
    broken = {
        "parity": False,
        "reason": "a | b",
        "weights": {"worst_error_in_steps": None},
        "forward": {"trainer": {"kl": None}, "first_module_outside": "model.layers.3"},
    }
    part = generated(model_card(facts(certificate=broken)))
    assert "| Verdict | **no parity**: a \\| b |" in part
    assert "| Leaves the band at | model.layers.3 |" in part


def test_warnings() -> None:
    assert warnings(facts()) == []
    low = {**RECORD, "survival": {"survived": 0.42}}
    assert "That is little" in model_card(facts(record=low))
    assert any("42.0%" in line for line in warnings(facts(record=low)))
    wrong = {**CERTIFICATE, "parity": False, "reason": "lm_head.weight differs"}
    assert any("lm_head.weight differs" in line for line in warnings(facts(certificate=wrong)))
    found = warnings(local())
    assert any("license" in line for line in found) and any("not on the Hub" in line for line in found)
    assert not any("license" in line for line in warnings(local(), "---\nlicense: mit\n---\n"))
    assert any("README.md's is kept" in line for line in warnings(facts(), "---\nbase_model: other/model\n---\n"))
    assert any("2 places" in line for line in warnings(facts(), f"# Me\n{TEMPLATE_FILLER}\n{TEMPLATE_FILLER}\n"))
    assert any(repr(LOCAL) in line for line in warnings(local(), f"# Me\n\nTrained on {LOCAL}.\n"))
    assert all("\n" not in line for line in found)


@QUICK
@given(
    name=st.text(min_size=1, max_size=40)
    | st.sampled_from(["a|b", "`x`", "<b>&", "a: 'b'", 'q"x', f"x\n{END}\n", "```\n"])
)
def test_odd_names(name: str) -> None:
    assume(not any("\ud800" <= c <= "\udfff" or c == "\x85" for c in name))  # PyYAML writes \x85 and reads a space
    record = {**RECORD, "adapter": {"name": name, "variant": name, "rank": name}, "mode": name, "precision": name}
    for kind in KINDS:
        files = tuple(f"{name}{ending}" for ending in (".gguf", ".onnx", ".onnx_adapter"))
        found = facts(
            kind,
            repo_id=f"ada/{name}",
            files=(*files, "genai_config.json") if kind == "onnx" else files,
            record={**record, "tool": {"name": name, "version": name}},
            certificate={**CERTIFICATE, "reason": name, "parity": False, "device": name},
            base_card={"license": name, "license_name": name, "license_link": name, "language": name},
            base_revision=name,
            adapter_revision=name,
        )
        card = model_card(found)
        assert metadata(card)["license"] == name
        assert model_card(found, card) == card
        assert card.count(f"\n{END}\n") == 1
        assert "<b>" not in re.sub(r"(?ms)^(`{3,})\w*\n.*?\n\1$", "", generated(card))
        rows = [line for line in generated(card).splitlines() if line.startswith("|")]
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in rows)
        for code in snippets(card):
            compile(code, "snippet", "exec")


def test_the_cells_read_as_the_names() -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    name = r"a|b `c` *d* __e__ <f> [g](h) ~i~ \j &amp; $k$"
    page = markdown.render(model_card(facts(certificate={**CERTIFICATE, "device": name})))
    cell = re.search(r"<td>Device</td>\s*<td>(.*?)</td>", page)
    assert cell is not None
    assert cell[1] == name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
