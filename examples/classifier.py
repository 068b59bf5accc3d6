"""Train a classifier with FOSSIL shards, export it to ONNX, classify new sentences with ONNX Runtime alone.

    python examples/classifier.py

The base is a tiny BERT with random weights, and the sentences are made up here, so the whole takes seconds. The
command that does what `export_onnx` does here:

    fossil-export onnx ADAPTER --base BASE --runtime torch --output model
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import onnxruntime as ort
import torch
from peft import MissConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)

from fossil_export import export_onnx
from fossil_export.onnx.modes import ModeName

LABELS = ("negative", "positive")
PRAISE = ["wonderful", "brilliant", "lovely", "superb", "charming", "delightful"]
BLAME = ["terrible", "dreadful", "boring", "awful", "clumsy", "painful"]
THINGS = ["film", "book", "song", "play", "meal", "hotel"]
FRAMES = (
    "the {thing} was {word}",
    "what a {word} {thing}",
    "i found the {thing} {word}",
    "we thought that the {thing} was really {word}",
)
SENTENCES = [
    (frame.format(thing=thing, word=word), label)
    for frame, thing in itertools.product(FRAMES, THINGS)
    for label, words in enumerate((BLAME, PRAISE))
    for word in words
]
NEW = (
    ("what a lovely evening", 1),
    ("we found the play boring", 0),
    ("i thought that the concert was superb", 1),
    ("the hotel was really dreadful", 0),
)


@dataclass(frozen=True)
class Result:
    """For each sentence of `NEW`: its label, as ONNX Runtime has it, and both models' logits."""

    labels: tuple[str, ...]
    onnx: Any
    peft: Any


def make_base(folder: Path) -> None:
    """A tiny BERT that has learnt nothing, and a tokenizer that knows the words of the sentences."""
    words = sorted({word for text, _ in SENTENCES for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer({word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, hidden_dropout_prob=0.0, **sizes)
    BertModel(config).save_pretrained(folder)


def classifier(base: Path) -> Any:
    labels = dict(enumerate(LABELS))
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, id2label=labels)


def train(base: Path, adapter: Path, steps: int = 120) -> None:
    """Train shards of the encoder's linears, and the classifier whole, on batches of `SENTENCES`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = MissConfig(
        r=16, target_modules=["query", "key", "value", "intermediate.dense", "output.dense"], task_type="SEQ_CLS"
    )
    model = get_peft_model(classifier(base), config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    chance = random.Random(0)
    for _ in range(steps):
        texts, labels = zip(*chance.sample(SENTENCES, 32), strict=True)
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)


def peft_logits(base: Path, adapter: Path, texts: list[str]) -> Any:
    """What the trained model says, in PEFT."""
    model = PeftModel.from_pretrained(classifier(base), adapter).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(adapter)(texts, return_tensors="pt", padding=True)).logits.numpy()


def onnx_logits(folder: Path, texts: list[str]) -> Any:
    """What the exported folder says, in ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    batch = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="np", padding=True)
    return session.run(["logits"], {entry.name: batch[entry.name] for entry in session.get_inputs()})[0]


def main(mode: ModeName = "merged") -> Result:
    """Train, export in `mode`, classify, compare."""
    logging.captureWarnings(True)
    texts = [text for text, _ in NEW]
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter, output = (Path(temporary) / name for name in ("base", "adapter", "model"))
        print(f"1. a tiny BERT, and FOSSIL shards that PEFT trains on {len(SENTENCES)} sentences", flush=True)
        make_base(base)
        train(base, adapter)
        print(f"2. to ONNX, {mode}", flush=True)
        made = export_onnx(adapter, output, base=base, mode=mode, runtime="torch")
        print(f"   {made.targets} weights with shards, {made.nbytes / 1e6:.1f} MB in {made.seconds:.1f} s")
        print("3. new sentences in ONNX Runtime")
        onnx, peft = onnx_logits(output, texts), peft_logits(base, adapter, texts)
    labels = tuple(LABELS[index] for index in onnx.argmax(1))
    sure = np.exp(onnx.max(1)) / np.exp(onnx).sum(1)
    for text, label, share in zip(texts, labels, sure, strict=True):
        print(f"   {label}  {share:4.0%}  {text}")
    print(f"   largest difference to PEFT's logits: {np.abs(onnx - peft).max():.1e}")
    return Result(labels, onnx, peft)


if __name__ == "__main__":
    main()
