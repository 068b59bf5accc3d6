"""How a model of each task is opened and asked something: lines of Python for transformers.

What is asked fits any model of its task: nobody's training data, and nothing that only one model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fossil_export.cards._facts import Facts
from fossil_export.cards._markdown import string

QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"
"""What a model without a chat template goes on with."""

SENTENCE = "The train was late again, but the journey was beautiful."
_ANSWER = "Paris is the capital of France."
_NAMES = "Marie Curie was born in Warsaw."
_PICTURE, _SOUND = 'Image.open("photo.jpg")', 'load_audio("speech.wav", rate)'
_IMAGE = "from PIL import Image"
_AUDIO = "from transformers.audio_utils import load_audio"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Asked:
    """`model` and `reader` are classes of transformers: what opens the weights, and what makes the input. `lines` ask
    `model` by way of `tokenizer`, or `processor` if the reader is no tokenizer; `imports` are those of the lines."""

    model: str
    lines: Callable[[Facts], list[str]]
    reader: str | None = "AutoTokenizer"
    imports: tuple[str, ...] = ()

    @property
    def reads(self) -> str:
        """The name of the reader's object."""
        return "tokenizer" if self.reader == "AutoTokenizer" else "processor"


def asked(kind: str | None) -> Asked:
    """Of a task; of one that is not known, only how the model is opened."""
    return ASKED.get(kind) or Asked("AutoModel", lambda facts: ["print(model)"], None)


def chats(facts: Facts) -> bool | None:
    """Whether a chat template goes along; None if that is not known."""
    if any(name in facts.files for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if facts.chats is not None:
        return facts.chats
    # An older tokenizer keeps its template in tokenizer_config.json. Without a tokenizer, the base's counts.
    return None if TOKENIZER[0] in facts.files or TOKENIZER[1] not in facts.files else False


def sentences(facts: Facts, kind: str | None) -> tuple[str, ...]:
    """What a tokenizer is given: one text, or the two that are held against each other."""
    tag = (facts.base_card or {}).get("pipeline_tag")
    if tag == "text-ranking" or kind == "question-answering":
        return QUESTION, _ANSWER
    if tag == "zero-shot-classification":
        return SENTENCE, "This is about travel."
    if kind == "token-classification":
        return (_NAMES,)
    if kind == "text-generation":
        return (BEGINNING,)
    return (QUESTION,) if kind == "text2text" and tag not in ("translation", "summarization") else (SENTENCE,)


def label(facts: Facts, logits: str, names: str) -> list[str]:
    """Lines that print what a classifier says: the names of its classes, or numbers if there is one or none."""
    config = facts.config or {}
    labels = config.get("id2label")
    if config.get("problem_type") == "regression" or (isinstance(labels, Mapping) and len(labels) == 1):
        return [f"print({logits}[0].tolist())"]
    if config.get("problem_type") == "multi_label_classification":
        return [f"print([{names}[number] for number, score in enumerate({logits}[0].tolist()) if score > 0])"]
    return [f"print([{names}[number] for number in {logits}[0].argmax(-1).reshape(-1).tolist()])"]


def _tokens(facts: Facts, kind: str | None) -> str:
    texts = ", ".join(map(string, sentences(facts, kind)))
    return f'inputs = tokenizer({texts}, return_tensors="pt")'


def _either(facts: Facts, reader: str, chat: list[str], plain: list[str]) -> list[str]:
    """The lines for a model that chats, for one that does not, or both if it is not known."""
    known = chats(facts)
    if known is not None:
        return chat if known else plain
    indented = ([f"    {line}" for line in lines] for lines in (chat, plain))
    first, second = indented
    return [f"if {reader}.chat_template:", *first, "else:", *second]


def _text_generation(facts: Facts) -> list[str]:
    chat = [
        f'messages = [{{"role": "user", "content": {string(QUESTION)}}}]',
        "inputs = tokenizer.apply_chat_template(",
    ]
    chat += ['    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"', ")"]
    return [
        *_either(facts, "tokenizer", chat, [_tokens(facts, "text-generation")]),
        "output = model.generate(**inputs, max_new_tokens=64)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _text2text(facts: Facts) -> list[str]:
    lines = [_tokens(facts, "text2text"), "output = model.generate(**inputs, max_new_tokens=64)"]
    return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]


def _fill_mask(facts: Facts) -> list[str]:
    lines = [f'inputs = tokenizer(f"{BEGINNING} {{tokenizer.mask_token}}.", return_tensors="pt")']
    lines += ['masked = inputs["input_ids"][0] == tokenizer.mask_token_id']
    return [*lines, "print(tokenizer.decode(model(**inputs).logits[0, masked].argmax(-1)))"]


def _question_answering(facts: Facts) -> list[str]:
    lines = [_tokens(facts, "question-answering"), "output = model(**inputs)"]
    lines += ["start, end = output.start_logits.argmax(), output.end_logits.argmax()"]
    return [*lines, 'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))']


def _classified(kind: str) -> Callable[[Facts], list[str]]:
    def lines(facts: Facts) -> list[str]:
        return [_tokens(facts, kind), "logits = model(**inputs).logits", *label(facts, "logits", _LABELS)]

    return lines


def _features(facts: Facts) -> list[str]:
    return [_tokens(facts, None), "print(model(**inputs)[0].shape)"]


def _image(*lines: str) -> Callable[[Facts], list[str]]:
    return lambda facts: [f"image = {_PICTURE}", 'inputs = processor(images=image, return_tensors="pt")', *lines]


def _image_classification(facts: Facts) -> list[str]:
    return _image("logits = model(**inputs).logits", *label(facts, "logits", _LABELS))(facts)


def _image_labels(facts: Facts) -> list[str]:
    return [
        'labels = ["a photo of a person", "a photo of an animal", "a photo of a building"]',
        f'inputs = processor(text=labels, images={_PICTURE}, return_tensors="pt", padding=True)',
        "print(labels[model(**inputs).logits_per_image[0].argmax()])",
    ]


def _image_text(facts: Facts) -> list[str]:
    question = string("What is in this picture?")
    return _conversation(facts, "image", "photo.jpg", question, f"images={_PICTURE}")


def _audio_text(facts: Facts) -> list[str]:
    return _conversation(facts, "audio", "speech.wav", string("What is said here?"), f"audio={_SOUND}")


def _conversation(facts: Facts, what: str, file: str, question: str, plain: str) -> list[str]:
    chat = [f'content = [{{"type": "{what}", "path": "{file}"}}, {{"type": "text", "text": {question}}}]']
    chat += ["inputs = processor.apply_chat_template("]
    chat += ['    [{"role": "user", "content": content}],']
    chat += ['    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",', ")"]
    other = [f'inputs = processor({plain}, text={question}, return_tensors="pt")']
    if what == "audio":
        other.insert(0, "rate = processor.feature_extractor.sampling_rate")
    lines = _either(facts, "processor", chat, other)
    lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
    return [*lines, "print(processor.decode(output[0], skip_special_tokens=True))"]


def _sound(*lines: str, reader: str = "processor.feature_extractor") -> Callable[[Facts], list[str]]:
    return lambda facts: [
        f"rate = {reader}.sampling_rate",
        f'inputs = processor({_SOUND}, sampling_rate=rate, return_tensors="pt")',
        *lines,
    ]


def _audio_classification(facts: Facts) -> list[str]:
    lines = ("logits = model(**inputs).logits", *label(facts, "logits", _LABELS))
    return _sound(*lines, reader="processor")(facts)


_LABELS = "model.config.id2label"
_HEARD = "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])"
_SHAPE = "print(model(**inputs)[0].shape)"
ASKED: Mapping[Any, Asked] = {
    None: Asked("AutoModel", _features),
    "feature-extraction": Asked("AutoModel", _features),
    "sentence-similarity": Asked("AutoModel", _features),
    "text-generation": Asked("AutoModelForCausalLM", _text_generation),
    "text2text": Asked("AutoModelForSeq2SeqLM", _text2text),
    "translation": Asked("AutoModelForSeq2SeqLM", _text2text),
    "summarization": Asked("AutoModelForSeq2SeqLM", _text2text),
    "text-classification": Asked("AutoModelForSequenceClassification", _classified("text-classification")),
    "zero-shot-classification": Asked("AutoModelForSequenceClassification", _classified("text-classification")),
    "text-ranking": Asked("AutoModelForSequenceClassification", _classified("text-classification")),
    "token-classification": Asked("AutoModelForTokenClassification", _classified("token-classification")),
    "question-answering": Asked("AutoModelForQuestionAnswering", _question_answering),
    "fill-mask": Asked("AutoModelForMaskedLM", _fill_mask),
    "image-text-to-text": Asked("AutoModelForImageTextToText", _image_text, "AutoProcessor", (_IMAGE,)),
    "image-to-text": Asked("AutoModelForImageTextToText", _image_text, "AutoProcessor", (_IMAGE,)),
    "zero-shot-image-classification": Asked(
        "AutoModelForZeroShotImageClassification", _image_labels, "AutoProcessor", (_IMAGE,)
    ),
    "image-classification": Asked(
        "AutoModelForImageClassification", _image_classification, "AutoImageProcessor", (_IMAGE,)
    ),
    "image-feature-extraction": Asked("AutoModel", _image(_SHAPE), "AutoImageProcessor", (_IMAGE,)),
    "image-segmentation": Asked(
        "AutoModelForSemanticSegmentation",
        _image("print(model(**inputs).logits.argmax(1).shape)"),
        "AutoImageProcessor",
        (_IMAGE,),
    ),
    "object-detection": Asked(
        "AutoModelForObjectDetection",
        _image(
            "output, size = model(**inputs), image.size[::-1]",
            "print(processor.post_process_object_detection(output, threshold=0.5, target_sizes=[size]))",
        ),
        "AutoImageProcessor",
        (_IMAGE,),
    ),
    "depth-estimation": Asked(
        "AutoModelForDepthEstimation",
        _image("print(model(**inputs).predicted_depth.shape)"),
        "AutoImageProcessor",
        (_IMAGE,),
    ),
    "automatic-speech-recognition": Asked(
        "AutoModelForSpeechSeq2Seq", _sound("tokens = model.generate(**inputs)", _HEARD), "AutoProcessor", (_AUDIO,)
    ),
    "ctc": Asked(
        "AutoModelForCTC", _sound("tokens = model(**inputs).logits.argmax(-1)", _HEARD), "AutoProcessor", (_AUDIO,)
    ),
    "audio-text-to-text": Asked("AutoModelForSeq2SeqLM", _audio_text, "AutoProcessor", (_AUDIO,)),
    "audio-classification": Asked(
        "AutoModelForAudioClassification", _audio_classification, "AutoFeatureExtractor", (_AUDIO,)
    ),
    "sound": Asked("AutoModel", _sound(_SHAPE, reader="processor"), "AutoFeatureExtractor", (_AUDIO,)),
}
