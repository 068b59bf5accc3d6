"""Lines of Python that load a model with transformers, and ask it something."""

from __future__ import annotations

from collections.abc import Iterator

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import fenced, string
from fossil_export.cards._task import CLASSIFIERS, pipeline_tag, task

BASE = "the base model"
"""Stands where the base's name belongs when it is not on the Hub."""

PROMPT = "What is the capital of France?"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text2text": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-classification": "AutoModelForImageClassification",
}


def imported(kind: str | None, first: list[str], lines: list[str]) -> str:
    """The block of `lines`, after the imports they need; `kind` is the task here and below."""
    names = ", ".join(sorted({auto(kind), reader(kind)[0]}))
    first = [*first, "from PIL import Image"] if kind == "image-classification" else first
    return fenced("python", "\n".join([*first, f"from transformers import {names}", "", *lines]))


def run(facts: Facts, kind: str | None) -> list[str]:
    """Lines that put a question to `model`."""
    prompt = string(PROMPT)
    if kind == "image-classification":
        return [
            'inputs = processor(Image.open("photo.jpg"), return_tensors="pt")',
            "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
        ]
    if kind == "image-text-to-text":
        parts = f'{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": {prompt}}}'
        lines = [f"content = [{parts}]", "inputs = processor.apply_chat_template("]
        lines += ['    [{"role": "user", "content": content}],']
        lines += ['    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",', ")"]
        return [*lines, "output = model.generate(**inputs, max_new_tokens=64)", "print(processor.decode(output[0]))"]
    if kind == "text-generation":
        asked = [f'messages = [{{"role": "user", "content": {prompt}}}]', "inputs = tokenizer.apply_chat_template("]
        asked += ['    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"', ")"]
        said = [f'inputs = tokenizer({prompt}, return_tensors="pt")']
        if not chats(facts):
            # An older tokenizer keeps its template in tokenizer_config.json, of which only the name is known here.
            either = ["if tokenizer.chat_template:", *(f"    {line}" for line in asked), "else:", f"    {said[0]}"]
            unknown = "tokenizer_config.json" in facts.files or "tokenizer.json" not in facts.files
            asked = either if unknown else said
        return [
            *asked,
            "output = model.generate(**inputs, max_new_tokens=64)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    if kind == "fill-mask":
        lines = ['inputs = tokenizer(f"The capital of France is {tokenizer.mask_token}.", return_tensors="pt")']
        lines += ['masked = inputs["input_ids"][0] == tokenizer.mask_token_id']
        return [*lines, "print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))"]
    if kind == "question-answering":
        lines = [f'inputs = tokenizer({prompt}, "Paris is the capital of France.", return_tensors="pt")']
        lines += ["output = model(**inputs)"]
        lines += ["start, end = output.start_logits.argmax(), output.end_logits.argmax()"]
        return [*lines, 'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))']
    lines = [f'inputs = tokenizer({prompt}, return_tensors="pt")']
    if kind == "text2text":
        lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
        return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    if kind in CLASSIFIERS:
        lines += ["classes = model(**inputs).logits[0].argmax(-1).reshape(-1).tolist()"]
        return [*lines, "print([model.config.id2label[number] for number in classes])"]
    return [*lines, "print(model(**inputs)[0].shape)"]


def task_or_pipeline(facts: Facts) -> str | None:
    """What the artifact does, by its config or else by the base's card."""
    found = task(facts)
    return found if found is not None else pipeline_tag(facts)


def auto(kind: str | None) -> str:
    """The class that opens a model."""
    return _AUTO.get(kind or "", "AutoModel")


def reader(kind: str | None) -> tuple[str, str]:
    """The class that makes a model's input, and what its object is called here."""
    if kind == "image-text-to-text":
        return "AutoProcessor", "processor"
    return ("AutoImageProcessor", "processor") if kind == "image-classification" else ("AutoTokenizer", "tokenizer")


def tokenizer_of(facts: Facts, kind: str | None) -> str:
    """Where the tokenizer is: beside the weights, or with the base."""
    files = ("preprocessor_config.json", "processor_config.json") if reader(kind)[1] == "processor" else TOKENIZER
    return facts.repo_id if any(name in facts.files for name in files) else facts.base or BASE


def chats(facts: Facts) -> bool:
    """Whether a chat template goes along."""
    return any(name in facts.files for name in ("chat_template.jinja", "chat_template.json"))


def with_peft(facts: Facts) -> Iterator[str]:
    """The blocks on how PEFT loads an adapter."""
    kind, base = task_or_pipeline(facts), facts.base or BASE
    more = []
    if facts.base is not None and facts.base_revision:
        more.append(f"revision={string(facts.base_revision)},")
    folder = f"subfolder={string(facts.base_folder)}" if facts.base is not None and facts.base_folder else ""
    if folder:
        more.append(f"{folder},")
    if kind in CLASSIFIERS and kind != "question-answering":
        more.append("num_labels=2,  # as many as the adapter was trained with")
    lines = [f"base = {auto(kind)}.from_pretrained({string(base)})"]
    if more:
        lines = [
            f"base = {auto(kind)}.from_pretrained(",
            *(f"    {line}" for line in (string(base) + ",", *more)),
            ")",
        ]
    reads = tokenizer_of(facts, kind)
    where = string(reads) + (f", {folder}" if folder and reads == facts.base else "")
    lines += [
        f"model = PeftModel.from_pretrained(base, {string(facts.repo_id)})",
        f"{reader(kind)[1]} = {reader(kind)[0]}.from_pretrained({where})",
    ]
    yield imported(kind, ["from peft import PeftModel"], [*lines, "", *run(facts, kind)])
    if facts.base is None:
        yield f"The base is not on the Hub: put its folder in the place of `{BASE}`."
