"""The part of the card between the markers: what the artifact is, how it was made and is used, what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards._facts import Facts, adapters_of, hub_id, part, paths_of, survived
from fossil_export.cards._markdown import fenced, number, plain
from fossil_export.cards._methods import methods_of
from fossil_export.cards.kinds._kind_card import Sources
from fossil_export.cards.kinds._table import CARDS
from fossil_export.merging._provenance import scales
from fossil_export.merging._survival import WARNING_BELOW

_PACKAGES = ("torch", "transformers", "peft")


def generated(facts: Facts) -> str:
    """All of the part between the markers."""
    found = [
        _summary(facts),
        "## How it was made",
        _table(("Item", "Value"), _made(facts)),
        "## How to use it",
        "\n\n".join(CARDS[facts.kind].usage(facts)),
    ]
    if facts.certificate is not None or KINDS[facts.kind].verified:
        found += ["## Is it the model that was trained?", *_verdict(facts)]
    kept = survived(facts)
    if kept is not None:
        found += ["## What rounding left of the update"]
        rows = part(facts.record, "survival").get("sample_rows_per_tensor")
        measured = f", measured on {rows} rows of each" if isinstance(rows, int) else ""
        found += [f"{kept:.1%} of the trained update is in the stored weights{measured}."]
        if kept < WARNING_BELOW:
            kept_format = part(facts.record, "quantization").get("kept") is True
            remedy = "without `--requantize`" if kept_format else "with `--dtype float32`"
            found += [
                "**That is little**: steps of the weights' number format are larger than much of what was trained. "
                f"A merge {remedy}, or the adapter apart from the weights, keeps all of it."
            ]
    papers = [method.paper for method in methods_of(facts) if method.paper is not None]
    if papers:
        word = "method" if len(papers) == 1 else "methods"
        found += ["## Citation", f"The {word}:", *(fenced("bibtex", paper.bibtex()) for paper in papers)]
    return "\n\n".join(found)


def _summary(facts: Facts) -> str:
    base = _link(facts, facts.base, facts.base_revision) or "a base model that is not on the Hub"
    link = _link(facts, facts.adapter, facts.adapter_revision)
    adapter = f"the adapter {link}" if link else "an adapter"
    adapter = f"the sum of {len(facts.adapters)} adapters" if facts.adapters else adapter
    method = " and ".join(method.markdown() for method in methods_of(facts))
    line = CARDS[facts.kind].summary(facts, Sources(base, adapter, method))
    return line[0].upper() + line[1:]


def _made(facts: Facts) -> Iterator[tuple[str, Any]]:
    record, card = facts.record or {}, CARDS[facts.kind]
    adapter = part(record, "adapter")
    for entry, name in zip(adapters_of(record), facts.adapters, strict=False):
        where = _link(facts, name, entry.get("revision")) or "not on the Hub"
        yield "Adapter", f"{where} ({plain(entry.get('variant') or '')}, at weight {number(entry.get('weight'), 'g')})"
    if not facts.adapters and (not card.is_the_adapter or adapter.get("name")):
        yield "Adapter", _link(facts, facts.adapter, facts.adapter_revision) or "not on the Hub"
    yield "Adapter's revision", plain(facts.adapter_revision or "") if facts.adapter else None
    yield "Base", _link(facts, facts.base, facts.base_revision) or "not on the Hub"
    yield "Base's revision", plain(facts.base_revision or "") if facts.base else None
    yield "Variant", plain(adapter.get("variant") or "")
    yield "Rank", plain(adapter.get("rank") or "")
    yield "Weight of the update", ", ".join(sorted({number(scale, "g") for scale in scales(record)}))
    if isinstance(parameters := adapter.get("parameters"), int):
        yield "Trained parameters", f"{parameters:,}"
    yield from card.made(facts)
    if tool := part(record, "tool"):
        yield "Made by", plain(f"{tool.get('name', 'fossil-export')} {tool.get('version', '')}")


def _verdict(facts: Facts) -> Iterator[str]:
    found = facts.certificate or {}
    if found.get("parity") not in (True, False):
        yield "It was not verified: `fossil-export verify` compares weights and answers with the trainer's."
        return
    if part(found, "forward"):
        yield "`fossil-export verify` compared it with the adapter on its base:"
    else:
        yield "`fossil-export verify --level weights` compared numbers, not answers, with the adapter on its base:"
    yield _table(("Check", "Result"), _figures(facts, found))


def _figures(facts: Facts, found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    reason = plain(_without_paths(str(found.get("reason") or ""), facts))
    told = "parity"
    if found.get("requantized") and not part(found, "forward"):
        told = "quantized again as it must be; its answers were not compared with the trained model's"
    yield "Verdict", told if found["parity"] else f"**no parity**{': ' + reason if reason else ''}"
    what = "the adapters, at their weights," if len(adapters_of(found)) > 1 else "the adapter"
    yield "Compared with", f"{what} on {_base(found)}"
    if weights := part(found, "weights"):
        again = weights.get("requantized")
        keys = ("tensors", "merged", *(("requantized",) if again else ()), "wrong")
        yield "Weights", ", ".join(f"{number(weights.get(key), 'd')} {key}" for key in keys)
        worst = number(weights.get("worst_error_in_steps"), ".4f")
        if weights.get("merged") or not again:
            yield "Worst error", f"{worst} steps of the dtype (0.5 is exact rounding)"
    if forward := part(found, "forward"):
        trainer = part(forward, "trainer")
        yield "Trainer", f"{_distance(trainer)} ({plain(trainer.get('dtype') or '–')})"
        as_run = part(forward, "as_it_runs")
        yield "This model", _distance(part(forward, "artifact")) + (" (products in full precision)" if as_run else "")
        yield "As it runs", f"{_distance(as_run)} (products of 8 bits)" if as_run else None
        same = forward.get("same_continuations")
        same = same if isinstance(same, list) and len(same) == 2 else ["–", "–"]
        count, added = forward.get("prompts"), forward.get("added_prompts")
        more = f", {number(added, 'd')} of them built-in" if isinstance(added, int) and added else ""
        asked = f"{number(count, 'd')} prompts{more}, truth in {plain(forward.get('truth') or '–')}"
        yield "Same continuations", f"{number(same[0], 'd')} of {number(same[1], 'd')} ({asked})"
        yield "Leaves the band at", plain(forward.get("first_module_outside") or "")
    yield "Device", plain(found.get("device") or "")
    versions = part(found, "versions")
    ran = _PACKAGES if part(found, "forward") else ("numpy",)
    yield "Versions", ", ".join(f"{name} {plain(versions[name])}" for name in ran if versions.get(name))


def _base(found: Mapping[str, Any]) -> str:
    """The base that truth and trainer of a certificate ran on."""
    if found.get("base_weights") == "as trained":
        how = part(found, "trained_on")
        double = how.get("double_quant")
        told = "" if double is None else f" with{'' if double else 'out'} double quantization"
        return f"the base as training saw it ({plain(how.get('kind') or 'quantized')}{told})"
    stored = ", dequantized" if found.get("base_weights") == "dequantized" else ""
    over = ", **which is another model if training ran over quantized weights, as it seems**"
    return f"the base as it is stored{stored}{over if found.get('quantized_training') else ''}"


def _distance(found: Mapping[str, Any]) -> str:
    error, top = number(found.get("relative_error"), ".2e"), number(found.get("top1"), ".1%")
    return f"{error} from the truth, KL {number(found.get('kl'), '.1e')}, top-1 {top}"


def _without_paths(line: str, facts: Facts) -> str:
    for name in paths_of(facts):
        line = line.replace(name, name.rstrip("/\\").rpartition("/")[2])
    return re.sub(r"(?<![\w.:/-])(?:[A-Za-z]:|~|\.{1,2})?[/\\](?:[^\s/\\:;,'\"]+[/\\])*([^\s/\\:;,'\"]+)", r"\1", line)


def _link(facts: Facts, name: str | None, revision: str | None) -> str | None:
    if hub_id(name) is None or name is None:
        return None
    return f"[{plain(name)}]({facts.hub}/{quote(name)}" + (f"/tree/{quote(revision, safe='')})" if revision else ")")


def _table(head: tuple[str, str], rows: Iterator[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])
