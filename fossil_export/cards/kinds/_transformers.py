"""Lines of Python that load a model with transformers, and ask it something."""

from __future__ import annotations

from collections.abc import Iterator

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import fenced, string
from fossil_export.cards._task import CLASSIFIERS, pipeline_tag, task
from fossil_export.cards.kinds._asking import TOKENIZER, Asked, asked

BASE = "the base model"
"""Stands where the base's name belongs when it is not on the Hub."""

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def imported(found: Asked, facts: Facts, first: list[str], lines: list[str]) -> str:
    """The block of the lines that load a model and those that ask it, after the imports they need."""
    rest = found.lines(facts)
    names = ", ".join(sorted({found.model, found.reader or found.model}))
    # What a chat template reads by itself needs no import.
    used = [line for line in found.imports if any(f"{line.rpartition(' ')[2]}" in one for one in rest)]
    before = [line for line in used if "transformers" not in line]
    after = [line for line in used if "transformers" in line]
    imports = [*before, *first, f"from transformers import {names}", *after]
    return fenced("python", "\n".join([*imports, "", *lines, "", *rest]))


def task_or_pipeline(facts: Facts) -> str | None:
    """What the artifact does, by its config or else by the base's card."""
    found = task(facts)
    return found if found is not None else pipeline_tag(facts)


def reader_of(facts: Facts, found: Asked) -> str:
    """Where the tokenizer or processor is: beside the weights, or with the base."""
    files = _PROCESSOR if found.reads == "processor" else TOKENIZER
    return facts.repo_id if any(name in facts.files for name in files) else facts.base or BASE


def with_peft(facts: Facts) -> Iterator[str]:
    """The blocks on how PEFT loads an adapter."""
    kind, base = task_or_pipeline(facts), facts.base or BASE
    found, more = asked(kind), []
    if facts.base is not None and facts.base_revision:
        more.append(f"revision={string(facts.base_revision)},")
    folder = f"subfolder={string(facts.base_folder)}" if facts.base is not None and facts.base_folder else ""
    if folder:
        more.append(f"{folder},")
    if kind in CLASSIFIERS and kind != "question-answering":
        more.append("num_labels=2,  # as many as the adapter was trained with")
    lines = [f"base = {found.model}.from_pretrained({string(base)})"]
    if more:
        lines = [
            f"base = {found.model}.from_pretrained(",
            *(f"    {line}" for line in (string(base) + ",", *more)),
            ")",
        ]
    reads = reader_of(facts, found)
    where = string(reads) + (f", {folder}" if folder and reads == facts.base else "")
    lines += [f"model = PeftModel.from_pretrained(base, {string(facts.repo_id)})"]
    lines += [f"{found.reads} = {found.reader}.from_pretrained({where})"] if found.reader else []
    yield imported(found, facts, ["from peft import PeftModel"], lines)
    if facts.base is None:
        yield f"The base is not on the Hub: put its folder in the place of `{BASE}`."
