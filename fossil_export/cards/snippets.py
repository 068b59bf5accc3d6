"""How an artifact is used, as Markdown: a snippet for each kind, which runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fossil_export.cards.facts import Facts

BASE = "the base model"
"""Stands where the base's name belongs when it is not on the Hub."""

_PROMPT = "What is an ammonite?"
_HEADS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}
_TASK_TYPES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
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
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_CLASSIFIERS = ("text-classification", "token-classification", "question-answering", "image-classification")
_STAYS = {"text-classification": ("zero-shot-classification", "text-ranking")}
# Finer names that a base's card may have for the same head.


def task(facts: Facts) -> str | None:
    """What the artifact's own config says it does: a pipeline's name, or "text2text" for encoder-decoders."""
    config, record = facts.config or {}, facts.record or {}
    if config.get("task_type") in _TASK_TYPES:
        return _TASK_TYPES[config["task_type"]]
    edits = record.get("config_edits")
    given = config.get("architectures") or (edits.get("architectures") if isinstance(edits, dict) else None)
    name = str(given[0]) if isinstance(given, list) and given else ""
    for ending, found in _HEADS.items():
        if name.endswith(ending):
            return found
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "image-text-to-text"
        # Whisper and its like are encoder-decoders too, of sound.
        if config.get("is_encoder_decoder", True) and not {"num_mel_bins", "audio_config"} & config.keys():
            return "text2text"
    if not name and (facts.kind == "gguf-lora" or "genai_config.json" in facts.files):
        return "text-generation"
    return None


def pipeline_tag(facts: Facts) -> str | None:
    """The base's, unless the adapter gave the model another head. text2text-generation is no pipeline of the Hub any
    more but a part of text-generation (huggingface.js, packages/tasks/src/pipelines.ts)."""
    own = task(facts)
    given = (facts.base_card or {}).get("pipeline_tag")
    given = given if isinstance(given, str) and given else None
    own, given = ("text-generation" if name in ("text2text", "text2text-generation") else name for name in (own, given))
    if own in _CLASSIFIERS:
        return given if given in _STAYS.get(own, ()) else own
    if own is not None and given in (*_CLASSIFIERS, "fill-mask"):
        return own
    return given or own


def usage(facts: Facts) -> str:
    """The section, without its heading."""
    by_kind = {"merged": _merged, "lora": _peft, "miss": _peft, "gguf-lora": _gguf, "onnx": _onnx}
    return "\n\n".join(by_kind[facts.kind](facts))


def fenced(language: str, code: str) -> str:
    """A code block that nothing in `code` closes."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def plain(name: Any) -> str:
    """`name` in one line of Markdown, also in a table, as it reads: nothing in it is markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def _string(name: str) -> str:
    """A Python string literal."""
    return json.dumps(name, ensure_ascii=False)


def _word(name: str) -> str:
    """One word of a shell's line."""
    return shlex.quote("".join(c if c.isprintable() else "?" for c in name))


def _merged(facts: Facts) -> Iterator[str]:
    kind = _task_or_pipeline(facts)
    trust = ", trust_remote_code=True" if (facts.config or {}).get("auto_map") else ""
    lines = [
        f"model = {_auto(kind)}.from_pretrained({_string(facts.repo_id)}{trust})",
        f"{_reader(kind)[1]} = {_reader(kind)[0]}.from_pretrained({_string(_tokenizer(facts, kind))}{trust})",
    ]
    yield _imported(kind, [], [*lines, "", *_run(facts, kind)])


def _peft(facts: Facts) -> Iterator[str]:
    config, kind = facts.config or {}, _task_or_pipeline(facts)
    base = facts.base or BASE
    more = []
    if facts.base is not None and facts.base_revision:
        more.append(f"revision={_string(facts.base_revision)},")
    folder = f"subfolder={_string(facts.base_folder)}" if facts.base is not None and facts.base_folder else ""
    if folder:
        more.append(f"{folder},")
    if kind in _CLASSIFIERS and kind != "question-answering":
        more.append("num_labels=2,  # as many as the adapter was trained with")
    lines = [f"base = {_auto(kind)}.from_pretrained({_string(base)})"]
    if more:
        lines = [
            f"base = {_auto(kind)}.from_pretrained(",
            *(f"    {line}" for line in (_string(base) + ",", *more)),
            ")",
        ]
    reads = _tokenizer(facts, kind)
    where = _string(reads) + (f", {folder}" if folder and reads == facts.base else "")
    lines += [
        f"model = PeftModel.from_pretrained(base, {_string(facts.repo_id)})",
        f"{_reader(kind)[1]} = {_reader(kind)[0]}.from_pretrained({where})",
    ]
    yield _imported(kind, ["from peft import PeftModel"], [*lines, "", *_run(facts, kind)])
    if facts.base is None:
        yield f"The base is not on the Hub: put its folder in the place of `{BASE}`."
    rank = config.get("r")
    if facts.kind != "lora" or kind != "text-generation" or config.get("modules_to_save") or not isinstance(rank, int):
        return
    from fossil_export.converting.lora import SERVED

    served = next((step for step in SERVED if step >= rank), None)
    if served is not None:
        line = f"vllm serve {_word(base)} --enable-lora --max-lora-rank {served} --lora-modules "
        yield "With vLLM:\n\n" + fenced("bash", line + _word(f"{_short(facts)}={facts.repo_id}"))


def _gguf(facts: Facts) -> Iterator[str]:
    file = next((name for name in facts.files if name.endswith(".gguf")), "adapter.gguf")
    base = plain(facts.base) if facts.base is not None else BASE
    yield f"It is added to a GGUF of {base}, quantized or not, here `base.gguf`. With llama.cpp:"
    download = f"hf download {_word(facts.repo_id)} {_word(file)} --local-dir ."
    yield fenced("bash", f"{download}\nllama-server --model base.gguf --lora {_word(file)}")
    shown = "".join(c if c.isprintable() else "?" for c in file)
    yield "With Ollama, from a file `Modelfile`:\n\n" + fenced("", f"FROM ./base.gguf\nADAPTER ./{shown}")
    name = _word(_short(facts).lower())
    yield fenced("bash", f"ollama create {name} --file Modelfile\nollama run {name}")


def _onnx(facts: Facts) -> Iterator[str]:
    record = facts.record or {}
    adapter = next((name for name in facts.files if name.endswith(".onnx_adapter")), None)
    file = _string(f"/{adapter}") if adapter is not None else ""
    folder = f"folder = snapshot_download({_string(facts.repo_id)})"
    if "genai_config.json" in facts.files:
        lines = ["import onnxruntime_genai as og", "from huggingface_hub import snapshot_download", "", folder]
        lines += ["model = og.Model(folder)", "tokenizer = og.Tokenizer(model)"]
        lines += ["params = og.GeneratorParams(model)", "params.set_search_options(max_length=256)"]
        lines += ["generator = og.Generator(model, params)"]
        if adapter is not None:
            lines += ["adapters = og.Adapters(model)", f'adapters.load(folder + {file}, "mine")']
            lines += ['generator.set_active_adapter(adapters, "mine")  # without this line: the base model']
        lines += [f"prompt = {_string(_PROMPT)}"]
        if _chats(facts):
            lines.insert(0, "import json\n")
            lines += ['messages = json.dumps([{"role": "user", "content": prompt}])']
            lines += ["prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"]
        lines += ["generator.append_tokens(tokenizer.encode(prompt))", "while not generator.is_done():"]
        lines += ["    generator.generate_next_token()", "print(tokenizer.decode(generator.get_sequence(0)))"]
        yield fenced("python", "\n".join(lines))
    else:
        graph = record.get("graph") or next((name for name in facts.files if name.endswith(".onnx")), "model.onnx")
        reads = "text" if any(name in facts.files for name in _TOKENIZER) else "arrays"
        lines = ["import onnxruntime as ort", "from huggingface_hub import snapshot_download"]
        lines += ["from transformers import AutoTokenizer", ""] if reads == "text" else [""]
        lines += [folder, f"session = ort.InferenceSession(folder + {_string(f'/{graph}')})"]
        options = ""
        if adapter is not None:
            lines += ["adapter, options = ort.LoraAdapter(), ort.RunOptions()", f"adapter.Load(folder + {file})"]
            lines += ["options.add_active_adapter(adapter)"]
            options = ", options"
        if reads == "text":
            lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
            lines += [f'tokens = tokenizer({_string(_PROMPT)}, return_tensors="np")']
            lines += ["feeds = {value.name: tokens[value.name] for value in session.get_inputs()}"]
        else:
            lines += ["print([(value.name, value.type, value.shape) for value in session.get_inputs()])"]
            lines += ["feeds = {}  # an array for each of these names"]
        lines += [f"print(session.run(None, feeds{options})[0])" + ("  # without options: the base" if options else "")]
        yield fenced("python", "\n".join(lines))
    if adapter is not None:
        made = "`fossil-export convert ADAPTER --to onnx-adapter --for FOLDER`"
        yield f"Other adapters of the same base, of any rank, are loaded in the same way; {made} makes them."


def _imported(kind: str | None, first: list[str], lines: list[str]) -> str:
    names = ", ".join(sorted({_auto(kind), _reader(kind)[0]}))
    first = [*first, "from PIL import Image"] if kind == "image-classification" else first
    return fenced("python", "\n".join([*first, f"from transformers import {names}", "", *lines]))


def _run(facts: Facts, kind: str | None) -> list[str]:
    """Lines that put a question to `model`."""
    prompt = _string(_PROMPT)
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
        if not _chats(facts):
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
        lines = ['inputs = tokenizer(f"An ammonite is a {tokenizer.mask_token}.", return_tensors="pt")']
        lines += ['masked = inputs["input_ids"][0] == tokenizer.mask_token_id']
        return [*lines, "print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))"]
    if kind == "question-answering":
        lines = [f'inputs = tokenizer({prompt}, "An ammonite is an extinct mollusc.", return_tensors="pt")']
        lines += ["output = model(**inputs)"]
        lines += ["start, end = output.start_logits.argmax(), output.end_logits.argmax()"]
        return [*lines, 'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))']
    lines = [f'inputs = tokenizer({prompt}, return_tensors="pt")']
    if kind == "text2text":
        lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
        return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    if kind in _CLASSIFIERS:
        lines += ["classes = model(**inputs).logits[0].argmax(-1).reshape(-1).tolist()"]
        return [*lines, "print([model.config.id2label[number] for number in classes])"]
    return [*lines, "print(model(**inputs)[0].shape)"]


def _task_or_pipeline(facts: Facts) -> str | None:
    found = task(facts)
    return found if found is not None else pipeline_tag(facts)


def _auto(kind: str | None) -> str:
    return _AUTO.get(kind or "", "AutoModel")


def _reader(kind: str | None) -> tuple[str, str]:
    """The class that makes a model's input, and what its object is called here."""
    if kind == "image-text-to-text":
        return "AutoProcessor", "processor"
    return ("AutoImageProcessor", "processor") if kind == "image-classification" else ("AutoTokenizer", "tokenizer")


def _tokenizer(facts: Facts, kind: str | None) -> str:
    """Where the tokenizer is: beside the weights, or with the base."""
    files = ("preprocessor_config.json", "processor_config.json") if _reader(kind)[1] == "processor" else _TOKENIZER
    return facts.repo_id if any(name in facts.files for name in files) else facts.base or BASE


def _chats(facts: Facts) -> bool:
    return any(name in facts.files for name in ("chat_template.jinja", "chat_template.json"))


def _short(facts: Facts) -> str:
    return facts.repo_id.rpartition("/")[2]
