"""Two FOSSIL adapters take turns on one int4 model in memory, in ONNX Runtime GenAI.

    python examples/chat.py                  # base, first adapter, second adapter, base again
    python examples/chat.py --interactive    # type the beginning of a sentence; /base /one /two switch

The model (SmolLM2-135M), the adapters and the ONNX folder are made once and cached (see smollm2.py): a minute or
two the first time, seconds after that. The commands that do what `export_onnx` and `convert` do here:

    fossil-export onnx ADAPTER --mode swappable --precision int4 --output model
    fossil-export convert OTHER --to onnx-adapter --for model --output two.onnx_adapter
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import onnxruntime_genai as genai
import smollm2

from fossil_export import __version__, convert, export_onnx

TOKENS = 12


class Chat:
    """A swappable ONNX folder in memory. Whoever speaks, the weights stay where they are."""

    def __init__(self, folder: Path) -> None:
        self._model = genai.Model(str(folder))
        self._tokenizer = genai.Tokenizer(self._model)
        self._adapters = genai.Adapters(self._model)
        self.switch_ms = 0.0

    def load(self, name: str, file: Path) -> float:
        """Make an adapter file known as `name`; returns the milliseconds it took."""
        start = time.perf_counter()
        self._adapters.load(str(file), name)
        return (time.perf_counter() - start) * 1e3

    def answer(self, prompt: str, speaker: str = "base", tokens: int = TOKENS) -> Iterator[str]:
        """The greedy continuation of `prompt`, piece by piece; `switch_ms` is what changing the speaker took."""
        ids = self._tokenizer.encode(prompt)
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + tokens, do_sample=False)
        start = time.perf_counter()
        generator = genai.Generator(self._model, params)
        if speaker != "base":
            generator.set_active_adapter(self._adapters, speaker)
        self.switch_ms = (time.perf_counter() - start) * 1e3
        generator.append_tokens(ids)
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])


def export(folder: Path) -> None:
    """The int4 base with places for adapters, and the first adapter beside it, in `folder`/model."""
    adapter, output = smollm2.adapter(), folder / "model"
    export_onnx(adapter, output, mode="swappable", runtime="genai", precision="int4", progress=True)


def main(arguments: Sequence[str] = (), model: Path | None = None) -> list[str]:
    """Show the four answers and return them; `model` is the ONNX folder, by default the cached one."""
    parser = argparse.ArgumentParser(description="Two FOSSIL adapters take turns on one int4 model in memory.")
    parser.add_argument("--interactive", action="store_true", help="talk to the model yourself")
    options = parser.parse_args(arguments)
    logging.captureWarnings(True)
    print("1. one int4 base with places for adapters (made once)", flush=True)
    model = model or smollm2.once(f"chat-int4-{__version__}", export) / "model"
    sizes = [f"{(model / name).stat().st_size / 1e6:.0f} MB" for name in ("model.onnx.data", "adapter.onnx_adapter")]
    print(f"   {model}: {sizes[0]}, first adapter {sizes[1]}")
    with tempfile.TemporaryDirectory() as temporary:
        two = Path(temporary) / "two.onnx_adapter"
        print("2. another adapter, converted for it", flush=True)
        made = convert(smollm2.other_adapter(), two, to="onnx-adapter", graph=model)
        print(f"   {made.nbytes / 1e6:.0f} MB in {made.seconds:.1f} s")
        chat = Chat(model)
        loaded = [chat.load("one", model / "adapter.onnx_adapter"), chat.load("two", two)]
        print(f"   both loaded beside the base: {loaded[0]:.1f} ms and {loaded[1]:.1f} ms")
        if options.interactive:
            talk(chat)
            return []
        print(f'3. "{smollm2.PROMPT} …"')
        answers = []
        for speaker in ("base", "one", "two", "base"):
            answers.append("".join(chat.answer(smollm2.PROMPT, speaker)))
            print(f"   {speaker:4}  switched in {chat.switch_ms:.2f} ms  …{' '.join(answers[-1].split())}", flush=True)
        same = "the same answer" if answers[0] == answers[-1] else "NOT the same answer"
        print(f"   the base, before and after: {same}")
    return answers


def talk(chat: Chat) -> None:
    """Continue what is typed, until an empty line."""
    speaker = "base"
    print("3. begin a sentence; /base, /one, /two switch, an empty line ends")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while line := input(f"{speaker}> ").strip():
            if line in ("/base", "/one", "/two"):
                speaker = line[1:]
                continue
            for piece in chat.answer(line, speaker, tokens=40):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main(sys.argv[1:])
