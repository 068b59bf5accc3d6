"""Facts of a model to be published, and what a card says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, settings

from fossil_export.cards import BEGIN, END, Facts

BASE, ADAPTER, LOCAL = "meta-llama/Llama-3.2-1B", "ada/mascot-miss", "/home/ada/models/base"
REVISION, ADAPTER_REVISION = "a" * 40, "b" * 40
RECORD = {
    "tool": {"name": "fossil-export", "version": "0.4.0"},
    "adapter": {"name": ADAPTER, "peft_type": "MISS", "variant": "tile", "rank": 64, "parameters": 9_830_400},
    "base": {"name": BASE, "revision": REVISION},
    "dtype": "auto",
    "config_edits": {},
    "survival": {"survived": 0.9934, "energy": 1.1, "sample_rows_per_tensor": 64},
}
CERTIFICATE = {
    "parity": True,
    "reason": None,
    "adapter": {"name": ADAPTER, "variant": "tile", "rank": 64},
    "base": LOCAL,
    "device": "cpu (x86_64, 2 cores)",
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "weights": {"tensors": 272, "merged": 210, "wrong": 0, "worst_error_in_steps": 0.5, "elements_off": 0},
    "forward": {
        "prompts": 16,
        "truth": "float64",
        "trainer": {"dtype": "bfloat16", "relative_error": 0.0347, "kl": 0.014, "top1": 0.977},
        "artifact": {"relative_error": 0.0289, "kl": 0.0139, "top1": 0.9766},
        "same_continuations": [3, 4],
        "first_module_outside": None,
    },
}
BASE_CARD = {
    "language": ["en", "de"],
    "license": "llama3.2",
    "pipeline_tag": "text-generation",
    "tags": ["facebook", "llama-3"],
    "datasets": ["allenai/c4"],
    "metrics": ["accuracy"],
    "extra_gated_prompt": "Sign here",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FILES: dict[str, tuple[str, ...]] = {
    "merged": ("config.json", "model.safetensors", *TOKENIZER, "chat_template.jinja"),
    "lora": ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER),
    "miss": ("adapter_config.json", "adapter_model.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "gguf-lora": ("mascot.gguf",),
    "onnx": ("model.onnx", "model.onnx.data", "genai_config.json", "adapter.onnx_adapter", *TOKENIZER),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "merged": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"},
    "lora": {"task_type": "CAUSAL_LM", "r": 64, "peft_type": "LORA", "base_model_name_or_path": BASE},
    "miss": {"task_type": "CAUSAL_LM", "r": 64, "peft_type": "MISS", "base_model_name_or_path": BASE},
    "adapter": {"task_type": "CAUSAL_LM", "r": 64, "peft_type": "LORA", "base_model_name_or_path": BASE},
}
LORA = {"name": ADAPTER, "peft_type": "LORA", "variant": "lora", "rank": 64, "parameters": 9_830_400}
TEMPLATE_FILLER = "[More Information Needed]"


def facts(kind: str = "merged", **changes: Any) -> Facts:
    details = {
        "lora": {"lora": {"rank": 64, "exact": True}, "survival": {}},
        "adapter": {"adapter": LORA, "survival": {}},
        "onnx": {"mode": "swappable", "precision": "fp32", "runtime": "genai", "graph": "model.onnx", "survival": {}},
    }
    found = Facts(
        repo_id="ada/mascot",
        kind=kind,
        files=FILES[kind],
        record={**RECORD, **details.get(kind, {})},
        certificate=CERTIFICATE,
        config=CONFIGS.get(kind),
        base=BASE,
        base_revision=REVISION,
        adapter=ADAPTER,
        adapter_revision=ADAPTER_REVISION,
        base_card=BASE_CARD,
    )
    return replace(found, **changes)


def local(kind: str = "merged", **changes: Any) -> Facts:
    """Neither base nor adapter is on the Hub."""
    known = facts(kind)
    record = {**(known.record or {}), "base": {"name": LOCAL}, "adapter": {"name": "/home/ada/my-adapter"}}
    config = {**(known.config or {}), "base_model_name_or_path": LOCAL}
    nothing = {"base": None, "base_revision": None, "adapter": None, "adapter_revision": None, "base_card": None}
    return replace(known, **{"record": record, "config": config, **nothing, **changes})


def metadata(card: str) -> dict[str, Any]:
    """As the Hub's own client reads them; ModelCard must agree."""
    found = ModelCard(card).data.to_dict()
    block = re.match(r"---\n(.*?\n)---\n", card.replace("\r\n", "\n"), re.DOTALL)
    assert block is not None and yaml.safe_load(block[1]) == found
    return found


def generated(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END) + len(END)]


def snippets(card: str, language: str = "python") -> list[str]:
    return [found[2] for found in re.finditer(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)]


LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
