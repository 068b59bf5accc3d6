"""The card of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import fenced, plain, string
from fossil_export.cards.kinds._asking import BEGINNING, QUESTION, TOKENIZER, chats, label, sentences
from fossil_export.cards.kinds._kind_card import KindCard, Sources
from fossil_export.cards.kinds._transformers import task_or_pipeline


def _summary(facts: Facts, told: Sources) -> str:
    apart = (facts.record or {}).get("mode") == "swappable"
    where = "in a file of its own, which a session takes and leaves as it runs" if apart else "part of it"
    return f"{told.base}, fine-tuned with {told.method}, as an ONNX graph: {told.adapter} is {where}."


def _made(facts: Facts) -> Iterator[tuple[str, Any]]:
    record = facts.record or {}
    yield "Mode", plain(record.get("mode") or "")
    yield "Precision", plain(record.get("precision") or "")


def _relation(facts: Facts) -> str:
    return "quantized" if (facts.record or {}).get("precision") == "int4" else "finetune"


def _tags(facts: Facts) -> list[str]:
    return ["onnx"] + ["onnxruntime-genai"] * ("genai_config.json" in facts.files)


def _usage(facts: Facts) -> Iterator[str]:
    adapter = next((name for name in facts.files if name.endswith(".onnx_adapter")), None)
    lines = _genai(facts, adapter) if "genai_config.json" in facts.files else _session(facts, adapter)
    yield fenced("python", "\n".join(lines))
    if adapter is not None:
        made = "`fossil-export convert ADAPTER --to onnx-adapter --for FOLDER`"
        yield f"Other adapters of the same base, of any rank, are loaded in the same way; {made} makes them."


def _genai(facts: Facts, adapter: str | None) -> list[str]:
    """Lines for ONNX Runtime GenAI."""
    lines = ["import onnxruntime_genai as og", "from huggingface_hub import snapshot_download", "", _folder(facts)]
    lines += ["model = og.Model(folder)", "tokenizer = og.Tokenizer(model)"]
    lines += ["params = og.GeneratorParams(model)", "params.set_search_options(max_length=256)"]
    lines += ["generator = og.Generator(model, params)"]
    if adapter is not None:
        lines += ["adapters = og.Adapters(model)", f'adapters.load(folder + {string(f"/{adapter}")}, "mine")']
        lines += ['generator.set_active_adapter(adapters, "mine")  # without this line: the base model']
    if chats(facts):
        lines.insert(0, "import json\n")
        lines += [f'messages = json.dumps([{{"role": "user", "content": {string(QUESTION)}}}])']
        lines += ["prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"]
    else:
        lines += [f"prompt = {string(BEGINNING)}"]
    lines += ["generator.append_tokens(tokenizer.encode(prompt))", "while not generator.is_done():"]
    return [*lines, "    generator.generate_next_token()", "print(tokenizer.decode(generator.get_sequence(0)))"]


def _session(facts: Facts, adapter: str | None) -> list[str]:
    """Lines for ONNX Runtime itself."""
    kind = task_or_pipeline(facts)
    graph = (facts.record or {}).get("graph")
    graph = graph or next((name for name in facts.files if name.endswith(".onnx")), "model.onnx")
    reads = any(name in facts.files for name in TOKENIZER)
    told = reads and kind in ("text-classification", "token-classification") and "config.json" in facts.files
    lines = [] if reads else ["import numpy as np"]
    lines += ["import onnxruntime as ort", "from huggingface_hub import snapshot_download"]
    lines += [f"from transformers import {'AutoConfig, ' if told else ''}AutoTokenizer"] if reads else []
    lines += ["", _folder(facts), f"session = ort.InferenceSession(folder + {string(f'/{graph}')})"]
    options = ""
    if adapter is not None:
        lines += ["adapter, options = ort.LoraAdapter(), ort.RunOptions()"]
        lines += [f"adapter.Load(folder + {string(f'/{adapter}')})", "options.add_active_adapter(adapter)"]
        options = ", options"
    if reads:
        texts = ", ".join(map(string, sentences(facts, kind)))
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f'tokens = tokenizer({texts}, return_tensors="np")',
        ]
        lines += ["feeds = {value.name: tokens[value.name] for value in session.get_inputs()}"]
    else:
        lines += ['types = {"tensor(float)": "float32", "tensor(double)": "float64"}']
        lines += ["feeds = {}  # your arrays go in the place of these zeros", "for value in session.get_inputs():"]
        lines += ["    shape = [size if isinstance(size, int) else 1 for size in value.shape]"]
        lines += ["    feeds[value.name] = np.zeros(shape, types.get(value.type, value.type[7:-1]))"]
    without = "  # without options: the base" if options else ""
    if told:
        lines += ["labels = AutoConfig.from_pretrained(folder).id2label"]
        return [*lines, f"logits = session.run(None, feeds{options})[0]{without}", *label(facts, "logits", "labels")]
    return [*lines, f"print(session.run(None, feeds{options})[0]){without}"]


def _folder(facts: Facts) -> str:
    return f"folder = snapshot_download({string(facts.repo_id)})"


CARD = KindCard(summary=_summary, usage=_usage, made=_made, relation=_relation, tags=_tags)
