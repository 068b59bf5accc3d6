"""From training to a published model, by ids alone: train, push the adapter, merge on the way to the Hub, load it.

    hf auth login
    python examples/publish.py YOUR-NAME     # makes three private repositories under that name

The commands that do what `push`, `merge_to_hub`, `verify` and `publish_certificate` do here:

    fossil-export push ADAPTER YOUR-NAME/mascot-adapter --private
    fossil-export merge YOUR-NAME/mascot-adapter --push-to-hub YOUR-NAME/mascot --stream --private
    fossil-export verify YOUR-NAME/mascot --level weights --push-to-hub

The model (SmolLM2-135M) and the adapter are made once and cached (see smollm2.py). The base is pushed too, since the
one used here is made from a GGUF file; with a base that is on the Hub already that step falls away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import smollm2
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fossil_export import StreamResult, merge_to_hub, publish_certificate, push, verify

TOKENS = 12


@dataclass(frozen=True)
class Published:
    """What the trained model, unmerged, and the published one say; how the merge went."""

    trained: str
    published: str
    result: StreamResult


def main(arguments: Sequence[str] | None = None) -> Published:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("namespace", help="your name on the Hub, or your organization's")
    name = parser.parse_args(arguments).namespace
    base, adapter, model = f"{name}/smollm2-135m-instruct", f"{name}/mascot-adapter", f"{name}/mascot"

    print(f"1. the base model → {base}", flush=True)
    HfApi().create_repo(base, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=base, folder_path=smollm2.base_model())

    print(f"2. an adapter, trained on it by PEFT → {adapter}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        print(f"   {push(trained_adapter(base, Path(temporary)), adapter, private=True).url}")

    print(f"3. adapter and base, merged file by file → {model}", flush=True)
    result = merge_to_hub(adapter, model, private=True, progress=True)
    print(f"   {result.push.url}: one commit, never more than {result.plan.disk / 1e6:.0f} MB on this disk")

    found = verify(model, level="weights")
    print(f"4. every tensor compared with the adapter on its base: {'parity' if found.parity else found.problems[0]}")
    print(f"   {publish_certificate(found).url}: the model card quotes it", flush=True)

    print(f'5. "{smollm2.PROMPT} …"', flush=True)
    answers = Published(trained_answer(base, adapter), smollm2.answer(model, tokens=TOKENS), result)
    print(f"   trained:   {answers.trained}")
    print(f"   published: {answers.published}")
    return answers


def trained_adapter(base: str, folder: Path) -> Path:
    """The adapter as PEFT saves it when the base was loaded by its id."""
    shutil.copytree(smollm2.adapter(), folder, dirs_exist_ok=True)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}, indent=2))
    return folder


def trained_answer(base: str, adapter: str) -> str:
    """The greedy continuation by the model that was trained: base and adapter, not merged."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    inputs = tokenizer(smollm2.PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


if __name__ == "__main__":
    main()
