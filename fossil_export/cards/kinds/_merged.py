"""The card of a merged model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fossil_export.cards._facts import Facts, part
from fossil_export.cards._markdown import fenced, plain, string
from fossil_export.cards.kinds._asking import SENTENCE, asked
from fossil_export.cards.kinds._kind_card import KindCard, Sources
from fossil_export.cards.kinds._transformers import imported, reader_of, task_or_pipeline


def _summary(facts: Facts, told: Sources) -> str:
    return f"{told.base}, fine-tuned with {told.method}: {told.adapter} is merged into its weights."


def _made(facts: Facts) -> Iterator[tuple[str, Any]]:
    dtype, config = (facts.record or {}).get("dtype"), facts.config or {}
    own = config.get("dtype") or config.get("torch_dtype")
    if (seen := part(facts.record, "trained_on")).get("kind"):
        double = ", double quantization" if seen.get("double_quant") is True else ""
        where = "into the base's original weights, which is another model than the trained one"
        if (facts.record or {}).get("into") == "trained":
            where = "into the base dequantized again, as training saw it"
        yield "Trained on", f"the base quantized to {plain(seen['kind'])}{double}; merged {where}"
    if name := (quantization := part(facts.record, "quantization")).get("base"):
        kept = quantization.get("kept") is True
        told = "merged weights are quantized again, all others are as they were" if kept else "dequantized"
        yield "Quantization", f"the base's {plain(str(name))}: {told}"
    yield "Dtype", plain((own or "the base's") if dtype in (None, "auto") else dtype)


def _usage(facts: Facts) -> Iterator[str]:
    kind = task_or_pipeline(facts)
    trust = ", trust_remote_code=True" if (facts.config or {}).get("auto_map") else ""
    if "modules.json" in facts.files and kind in (None, "feature-extraction", "sentence-similarity"):
        lines = ["from sentence_transformers import SentenceTransformer", ""]
        lines += [f"model = SentenceTransformer({string(facts.repo_id)}{trust})"]
        lines += [f"vectors = model.encode([{string(SENTENCE)}, {string('The sun is shining today.')}])"]
        yield fenced("python", "\n".join([*lines, "print(model.similarity(vectors, vectors))"]))
        return
    found = asked(kind)
    lines = [f"model = {found.model}.from_pretrained({string(facts.repo_id)}{trust})"]
    if found.reader:
        lines += [f"{found.reads} = {found.reader}.from_pretrained({string(reader_of(facts, found))}{trust})"]
    yield imported(found, facts, [], lines)


def _library(facts: Facts) -> str:
    """A model of sentence-transformers keeps what says so; the Hub shows how it is loaded by this word."""
    return "sentence-transformers" if "modules.json" in facts.files else "transformers"


CARD = KindCard(summary=_summary, usage=_usage, made=_made, library=_library)
