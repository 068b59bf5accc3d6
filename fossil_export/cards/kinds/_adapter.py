"""The card of a trained adapter itself, of whatever method."""

from __future__ import annotations

from collections.abc import Iterator

from fossil_export.cards._facts import Facts
from fossil_export.cards.kinds import _miss as miss
from fossil_export.cards.kinds._kind_card import KindCard
from fossil_export.cards.kinds._lora import with_vllm
from fossil_export.cards.kinds._transformers import with_peft

_NOT_SERVED = ("alpha_pattern", "lora_bias", "rank_pattern", "use_dora", "use_qalora")
# What vLLM refuses, or passes over in silence (vllm/lora/peft_helper.py).


def _usage(facts: Facts) -> Iterator[str]:
    yield from with_peft(facts)
    config = facts.config or {}
    if config.get("peft_type") == "LORA" and not any(config.get(name) for name in _NOT_SERVED):
        yield from with_vllm(facts)


CARD = KindCard(
    summary=miss.CARD.summary,
    usage=_usage,
    library=lambda facts: "peft",
    relation=lambda facts: "adapter",
    is_the_adapter=True,
)
