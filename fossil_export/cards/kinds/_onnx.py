"""The card of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import fenced, plain, string
from fossil_export.cards.kinds._kind_card import KindCard, Sources
from fossil_export.cards.kinds._transformers import PROMPT, TOKENIZER, chats


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
    record = facts.record or {}
    adapter = next((name for name in facts.files if name.endswith(".onnx_adapter")), None)
    file = string(f"/{adapter}") if adapter is not None else ""
    folder = f"folder = snapshot_download({string(facts.repo_id)})"
    if "genai_config.json" in facts.files:
        lines = ["import onnxruntime_genai as og", "from huggingface_hub import snapshot_download", "", folder]
        lines += ["model = og.Model(folder)", "tokenizer = og.Tokenizer(model)"]
        lines += ["params = og.GeneratorParams(model)", "params.set_search_options(max_length=256)"]
        lines += ["generator = og.Generator(model, params)"]
        if adapter is not None:
            lines += ["adapters = og.Adapters(model)", f'adapters.load(folder + {file}, "mine")']
            lines += ['generator.set_active_adapter(adapters, "mine")  # without this line: the base model']
        lines += [f"prompt = {string(PROMPT)}"]
        if chats(facts):
            lines.insert(0, "import json\n")
            lines += ['messages = json.dumps([{"role": "user", "content": prompt}])']
            lines += ["prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"]
        lines += ["generator.append_tokens(tokenizer.encode(prompt))", "while not generator.is_done():"]
        lines += ["    generator.generate_next_token()", "print(tokenizer.decode(generator.get_sequence(0)))"]
        yield fenced("python", "\n".join(lines))
    else:
        graph = record.get("graph") or next((name for name in facts.files if name.endswith(".onnx")), "model.onnx")
        reads = "text" if any(name in facts.files for name in TOKENIZER) else "arrays"
        lines = ["import onnxruntime as ort", "from huggingface_hub import snapshot_download"]
        lines += ["from transformers import AutoTokenizer", ""] if reads == "text" else [""]
        lines += [folder, f"session = ort.InferenceSession(folder + {string(f'/{graph}')})"]
        options = ""
        if adapter is not None:
            lines += ["adapter, options = ort.LoraAdapter(), ort.RunOptions()", f"adapter.Load(folder + {file})"]
            lines += ["options.add_active_adapter(adapter)"]
            options = ", options"
        if reads == "text":
            lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
            lines += [f'tokens = tokenizer({string(PROMPT)}, return_tensors="np")']
            lines += ["feeds = {value.name: tokens[value.name] for value in session.get_inputs()}"]
        else:
            lines += ["print([(value.name, value.type, value.shape) for value in session.get_inputs()])"]
            lines += ["feeds = {}  # an array for each of these names"]
        lines += [f"print(session.run(None, feeds{options})[0])" + ("  # without options: the base" if options else "")]
        yield fenced("python", "\n".join(lines))
    if adapter is not None:
        made = "`fossil-export convert ADAPTER --to onnx-adapter --for FOLDER`"
        yield f"Other adapters of the same base, of any rank, are loaded in the same way; {made} makes them."


CARD = KindCard(summary=_summary, usage=_usage, made=_made, relation=_relation, tags=_tags)
