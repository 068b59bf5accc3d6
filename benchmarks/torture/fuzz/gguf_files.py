"""GGUF bases: damage to the head (metadata, table of tensors), the blocks and the bytes. The judge is transformers'
own loading of the same damaged file."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import small
from torture.fuzz.mutations import damage_bytes
from torture.fuzz.subject import Subject, Unjudged

HIDDEN, MIDDLE, KEYS, WORDS = 256, 512, 128, 64
KINDS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16", "Q5_1", "Q2_K")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = (0, 1, 2, 3, 7, 31, 32, 64, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62)
NUMBERS += ((1 << 63) - 1, (1 << 64) - 1)
TEXTS = ("", "x", "llama", "qwen2", "gpt2", "bloom", "adapter", "\x1b[2J", "é", "\ud800", "a" * 5000, "general.alignment")


@dataclass
class Head:
    """What stands before the tensors: entries (key, type, raw value) and rows (name, sizes, type, offset)."""

    entries: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    version: int = 3
    counts: list[int] = field(default_factory=list)

    def encoded(self, alignment: int = 32) -> bytes:
        tensors, pairs = self.counts or (len(self.rows), len(self.entries))
        found = struct.pack("<4sIQQ", b"GGUF", self.version, tensors, pairs)
        for key, kind, raw in self.entries:
            found += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + raw
        for name, sizes, kind, offset in self.rows:
            found += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
            found += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)
        return found + bytes(-len(found) % alignment)


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def parsed(data: bytes) -> tuple[Head, bytes]:
    """The head of a sound file, and the tensors' bytes."""
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    at, head = 24, Head(version=version)

    def take(form: str) -> Any:
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found[0] if len(found) == 1 else list(found)

    def string() -> bytes:
        nonlocal at
        count = take("Q")
        at += count
        return data[at - count : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            at += struct.calcsize(SCALARS[kind])

    for _ in range(pairs):
        key, kind = string(), take("I")
        start = at
        skip(kind)
        head.entries.append((key, kind, data[start:at]))
    for _ in range(tensors):
        name, count = string(), take("I")
        sizes = [take("Q") for _ in range(count)]
        head.rows.append([name, sizes, take("I"), take("Q")])
    return head, data[-(-at // 32) * 32 :]


@dataclass(frozen=True)
class Gguf:
    """A small Llama in one file, of which `place` is damaged: "metadata", "table", "blocks" or "tokenizer"."""

    place: str

    @property
    def name(self) -> str:
        return f"GGUF: {self.place}"

    def make(self, folder: Path) -> None:
        import gguf
        import transformers.modeling_gguf_pytorch_utils
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
                how = _damage_table(head, random)
            else:
                how = _damage_entry(head, random, self.place == "tokenizer")
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
    save_file({f"{start}A.weight": down, f"{start}B.weight": up}, folder / "adapter_model.safetensors", {"format": "pt"})


def _value(random: Random, depth: int = 0) -> tuple[int, bytes]:
    """Some type, and a value of it."""
    kind = random.choice((*SCALARS, 8, 9, 13, 255))
    if kind == 8:
        return kind, text(random.choice(TEXTS))
    if kind == 9 and depth < 3:
        count = random.choice((0, 1, 2, 3, 5000))
        inner, raw = _value(random, depth + 1)
        told = count if random.random() < 0.8 else random.choice(NUMBERS)
        return kind, struct.pack("<IQ", inner, told & (1 << 64) - 1) + raw * count
    if kind in (6, 12):
        return kind, struct.pack(f"<{SCALARS[kind]}", random.choice((0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"))))
    if kind in SCALARS:
        size = struct.calcsize(SCALARS[kind])
        return kind, (random.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return kind, random.randbytes(8)


def _damage_entry(head: Head, random: Random, tokenizer: bool) -> str:
    known = [n for n, (key, *_) in enumerate(head.entries) if key.startswith(b"tokenizer") is tokenizer]
    at = random.choice(known)
    key, kind, raw = head.entries[at]
    way = random.choice(("value", "value", "value", "number", "number", "number", "gone", "double", "key", "counts", "bytes"))
    if way == "number" and kind in SCALARS and SCALARS[kind] not in "f?d":
        size = struct.calcsize(SCALARS[kind])
        old = int.from_bytes(raw, "little")
        new = random.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2)) & (1 << 8 * size) - 1
        head.entries[at] = key, kind, new.to_bytes(size, "little")
        return f"{key.decode()} is {new}"
    if way == "gone":
        del head.entries[at]
    elif way == "double":
        head.entries.insert(random.randrange(len(head.entries)), head.entries[at])
    elif way == "key":
        new_key = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        head.entries[at] = random.choice((new_key, key + b"x", b"\xff\xfe")), kind, raw
    elif way == "counts":
        head.counts = [len(head.rows), len(head.entries)]
        head.counts[random.randrange(2)] = random.choice((*NUMBERS, len(head.entries) - 1, len(head.entries) + 1))
    elif way == "bytes":
        found, how = damage_bytes(raw, random)
        head.entries[at] = key, kind, found
        return f"{key.decode()}: {how}"
    else:
        head.entries[at] = key, *_value(random)
        return f"{key.decode()} is of type {head.entries[at][1]}: {head.entries[at][2][:40]!r}"
    return f"{key.decode()}: {way}"


def _damage_table(head: Head, random: Random) -> str:
    at = random.randrange(len(head.rows))
    name, sizes, kind, offset = row = head.rows[at]
    way = random.choice(("name", "size", "size", "axes", "kind", "kind", "offset", "offset", "gone", "double", "order"))
    if way == "name":
        other = random.choice(head.rows)[0]
        row[0] = random.choice((other, name + b"x", b"", b"\xff", b"x" * 5000, name.replace(b"0", b"1"), b"output.weight"))
    elif way == "size":
        axis = random.randrange(len(sizes))
        row[1] = list(sizes)
        row[1][axis] = random.choice((*NUMBERS, sizes[axis] - 1, sizes[axis] + 256, sizes[axis] // 2, sizes[axis] * 2))
    elif way == "axes":
        row[1] = random.choice(([*sizes, 1], [1, *sizes], [], sizes[::-1], [sizes[0]], [1, 1, 1, 1, 1], [2**63, 2], [1] * 70000))
    elif way == "kind":
        row[2] = random.choice((*range(45), 255, (1 << 32) - 1))
    elif way == "offset":
        row[3] = random.choice((*NUMBERS, offset + 32, abs(offset - 32), offset + 1, random.choice(head.rows)[3]))
    elif way == "gone":
        del head.rows[at]
    elif way == "double":
        head.rows.insert(random.randrange(len(head.rows)), list(row))
    else:
        random.shuffle(head.rows)
    return f"tensor {name.decode()} {sizes} {kind} {offset}: {way} {str(row[1:])[:120]}"


SUBJECTS: list[Subject] = [Gguf(place) for place in ("metadata", "tokenizer", "table", "blocks")]
