"""The card of a GGUF LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import fenced, plain, short, word
from fossil_export.cards.kinds._converted import as_lora, made
from fossil_export.cards.kinds._kind_card import KindCard
from fossil_export.cards.kinds._transformers import BASE


def _usage(facts: Facts) -> Iterator[str]:
    file = next((name for name in facts.files if name.endswith(".gguf")), "adapter.gguf")
    base = plain(facts.base) if facts.base is not None else BASE
    yield f"It is added to a GGUF of {base}, quantized or not, here `base.gguf`. With llama.cpp:"
    download = f"hf download {word(facts.repo_id)} {word(file)} --local-dir ."
    yield fenced("bash", f"{download}\nllama-server --model base.gguf --lora {word(file)}")
    shown = "".join(c if c.isprintable() else "?" for c in file)
    yield "With Ollama, from a file `Modelfile`:\n\n" + fenced("", f"FROM ./base.gguf\nADAPTER ./{shown}")
    name = word(short(facts.repo_id).lower())
    yield fenced("bash", f"ollama create {name} --file Modelfile\nollama run {name}")


CARD = KindCard(
    summary=as_lora,
    usage=_usage,
    made=made,
    relation=lambda facts: "adapter",
    tags=lambda facts: ["lora", "gguf"],
)
