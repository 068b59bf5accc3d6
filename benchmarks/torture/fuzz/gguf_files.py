"""GGUF bases: damage to the head (metadata, table of tensors), the blocks and the bytes. The judge is transformers'
own loading of the same damaged file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import small
from torture.fuzz.gguf_damage import damage_entry, damage_table, parsed
from torture.fuzz.mutations import damage_bytes
from torture.fuzz.subject import Subject, Unjudged

HIDDEN, MIDDLE, KEYS, WORDS = 256, 512, 128, 64
KINDS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16", "Q5_1", "Q2_K")


@dataclass(frozen=True)
class Gguf:
    """A small Llama in one file, of which `place` is damaged: "metadata", "table", "blocks" or "tokenizer"."""

    place: str

    @property
    def name(self) -> str:
        return f"GGUF: {self.place}"

    def make(self, folder: Path) -> None:
        import gguf
        import transformers.modeling_gguf_pytorch_utils  # noqa: F401
        from transformers import LlamaForCausalLM, LlamaTokenizerFast  # noqa: F401

        import fossil_export.models._gguf  # noqa: F401

        (folder / "base").mkdir(parents=True)
        writer = gguf.GGUFWriter(folder / "base" / "model.gguf", "llama")
        _metadata(writer)
        for name, values, kind in _weights():
            writer.add_tensor(name, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _write_adapter(folder / "adapter")

    def mutate(self, folder: Path, random: Random) -> str:
        path = folder / "base" / "model.gguf"
        data = path.read_bytes()
        if random.random() < 0.05:
            found, how = damage_bytes(data, random)
        else:
            head, rest = parsed(data)
            if self.place == "blocks":
                start = random.randrange(len(rest))
                count = random.choice((1, 2, 18, 256))
                new = random.choice((b"\0", b"\xff", b"\x7c", random.randbytes(1))) * count
                rest, how = rest[:start] + new + rest[start + count :], f"blocks {new[:1]!r} × {count} at {start}"
                rest = rest[: len(data)]
            elif self.place == "table":
                how = damage_table(head, random)
            else:
                how = damage_entry(head, random, self.place == "tokenizer")
            found = head.encoded() + rest
        path.write_bytes(found)
        return how

    def command(self, folder: Path, random: Random) -> list[str]:
        base = folder / "base"
        return ["merge", str(folder / "adapter"), "--base", str(base), "--output", str(folder / "out")]

    def judge(self, folder: Path) -> str | None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        config = GgufConfig(dequantize=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder / "base", gguf_file="model.gguf", quantization_config=config, dtype=torch.float32
            )
            model.save_pretrained(folder / "loaded")
        except Exception as problem:
            raise Unjudged(f"transformers: {type(problem).__name__}: {str(problem)[:300]}") from problem
        from safetensors.torch import load_file

        expected = load_file(folder / "loaded" / "model.safetensors")
        down, up = _lora()
        updates = {"model.layers.0.self_attn.q_proj.weight": 2 * (up.double() @ down.double())}
        problem_found = small.merged_problem(folder / "out", small.as_they_are(expected), updates)
        if problem_found is not None:
            return problem_found
        return _other_config(folder)


def _other_config(folder: Path) -> str | None:
    """What transformers' model computes must not differ by the config either."""
    import json

    told, own = (json.loads((folder / name / "config.json").read_text()) for name in ("loaded", "out"))
    for key in told.keys() | own.keys():
        if key not in ("transformers_version", "dtype", "quantization_config") and told.get(key) != own.get(key):
            return f"config.json has {key} {own.get(key)!r}, not {told.get(key)!r}"
    return None


def _metadata(writer: Any) -> None:
    numbers = {
        **{"context_length": 64, "block_count": 1, "feed_forward_length": MIDDLE, "embedding_length": HIDDEN},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 64, "vocab_size": WORDS},
    }
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 2e-5)
    writer.add_float32("llama.rope.freq_base", 20000.0)
    writer.add_bool("general.strange", True)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(97 + n % 26) * (n // 26 + 1) for n in range(WORDS - 1)), "<end>"])
    writer.add_token_types([1] * (WORDS - 1) + [3])
    writer.add_token_merges(["a a", "b b"])
    writer.add_eos_token_id(WORDS - 1)
    writer.add_pad_token_id(WORDS - 1)
    writer.add_chat_template("{{ messages }}")


def _weights() -> Any:
    import gguf
    import numpy as np

    rng = np.random.default_rng(4)
    shapes = {
        **{"token_embd.weight": (WORDS, HIDDEN), "blk.0.attn_q.weight": (HIDDEN, HIDDEN)},
        **{"blk.0.attn_k.weight": (KEYS, HIDDEN), "blk.0.attn_v.weight": (KEYS, HIDDEN)},
        **{"blk.0.attn_output.weight": (HIDDEN, HIDDEN), "blk.0.ffn_gate.weight": (MIDDLE, HIDDEN)},
        **{"blk.0.ffn_up.weight": (MIDDLE, HIDDEN), "blk.0.ffn_down.weight": (HIDDEN, MIDDLE)},
    }
    for number, (name, shape) in enumerate(shapes.items()):
        kind = gguf.GGMLQuantizationType[KINDS[number % len(KINDS)]]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name == "F16":
            yield name, rng.normal(0, 0.05, shape).astype(np.float16), None
            continue
        raw = rng.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
        for at in {"Q6_K": (208,), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_1": (0, 2)}.get(kind.name, (0,)):
            # Scales that are small numbers in float16.
            raw[..., at : at + 2] = rng.normal(0, 0.01, raw.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
        yield name, raw.reshape(shape[0], -1), kind.name
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        yield name, rng.normal(1, 0.05, HIDDEN).astype(np.float32), None


def _lora() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(8)
    down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, HIDDEN), (HIDDEN, 4)))
    return down, up


def _write_adapter(folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    down, up = _lora()
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{start}A.weight": down, f"{start}B.weight": up}, folder / "adapter_model.safetensors", {"format": "pt"}
    )


SUBJECTS: list[Subject] = [Gguf(place) for place in ("metadata", "tokenizer", "table", "blocks")]
