"""The card of a LoRA."""

from __future__ import annotations

from collections.abc import Iterator

from fossil_export.cards._facts import Facts, part
from fossil_export.cards._markdown import fenced, short, word
from fossil_export.cards.kinds._converted import as_lora, made, summary
from fossil_export.cards.kinds._kind_card import KindCard, Sources
from fossil_export.cards.kinds._transformers import BASE, task_or_pipeline, with_peft


def _summary(facts: Facts, told: Sources) -> str:
    near = "relative_error_by_module" in part(facts.record, facts.kind)
    return summary(told, "the LoRA nearest to its update") if near else as_lora(facts, told)


def _usage(facts: Facts) -> Iterator[str]:
    yield from with_peft(facts)
    yield from with_vllm(facts)


def with_vllm(facts: Facts) -> Iterator[str]:
    """The block on how vLLM serves a LoRA, if it does."""
    config = facts.config or {}
    rank = config.get("r")
    refused = config.get("modules_to_save") or config.get("lora_bias")
    if task_or_pipeline(facts) != "text-generation" or refused or not isinstance(rank, int):
        return
    from fossil_export.converting._lora import SERVED

    served = next((step for step in SERVED if step >= rank), None)
    if served is not None:
        line = f"vllm serve {word(facts.base or BASE)} --enable-lora --max-lora-rank {served} --lora-modules "
        yield "With vLLM:\n\n" + fenced("bash", line + word(f"{short(facts.repo_id)}={facts.repo_id}"))


CARD = KindCard(
    summary=_summary,
    usage=_usage,
    made=made,
    library=lambda facts: "peft",
    relation=lambda facts: "adapter",
    tags=lambda facts: ["lora"],
)
