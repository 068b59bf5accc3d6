"""Quantized bases of every format that is read: damage to what the config says of them, and to their tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import quantized_layers as layers
from torture.fuzz import quantized_meaning as meaning
from torture.fuzz import small
from torture.fuzz.mutations import damage_tree
from torture.fuzz.subject import Subject, Unjudged
from torture.fuzz.tensor_damage import damage_tensors

OPTIONS: tuple[tuple[str, ...], ...] = ((), (), (), ("--requantize", "--min-survival", "0"), ("--dtype", "float32"))


@dataclass(frozen=True)
class QuantizedBase:
    """A base whose linear layers are `linear`, under `settings`; `place` ("config" or "tensors") is damaged."""

    kind: str
    place: str
    settings: dict[str, Any]
    linear: layers.Linear
    meaning: meaning.Meaning
    dtype: str = "bfloat16"
    key: str = "quantization_config"

    @property
    def name(self) -> str:
        return f"base of {self.kind}: {self.place}"

    def make(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(5)
        tensors = small.floats(self.dtype, linears=self.kind == "mxfp4")
        modules = {f"{small.PREFIX}mlp.experts.down_proj": (32, 64)} if self.kind == "mxfp4" else small.LINEARS
        for module, (rows, columns) in modules.items():
            own = self.linear(rows, columns, generator)
            tensors |= {f"{module}{end}": value.contiguous() for end, value in own.items()}
        small.write_config(folder / "base", None, self.dtype, **{self.key: self.settings})
        metadata = {"format": "pt"}
        if self.kind.startswith("torchao"):
            metadata |= {f"{module}.weight": json.dumps(layers.TORCHAO[self.kind]) for module in modules}
            metadata["tensor_names"] = json.dumps([f"{module}.weight" for module in modules])
        save_file(tensors, folder / "base" / "model.safetensors", metadata)
        small.write_adapter(folder / "adapter")

    def mutate(self, folder: Path, random: Random) -> str:
        weights = folder / "base" / "model.safetensors"
        if self.place == "tensors":
            if "4 bits" in self.kind and random.random() < 0.3:
                return _damage_text_tensor(weights, random)
            return damage_tensors(weights, random, lambda name: any(part in name for part in ("proj", "experts")))
        if self.kind.startswith("torchao") and random.random() < 0.7:
            return _damage_metadata(weights, random)
        path = folder / "base" / "config.json"
        config = json.loads(path.read_bytes())
        config[self.key], how = damage_tree(config[self.key], random)
        path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
        return how

    def command(self, folder: Path, random: Random) -> list[str]:
        options = random.choice(OPTIONS)
        (folder / "asked").write_text(" ".join(options))
        base, out = str(folder / "base"), str(folder / "out")
        return ["merge", str(folder / "adapter"), "--base", base, "--output", out, *options]

    def judge(self, folder: Path) -> str | None:
        import torch

        again = "--requantize" in (folder / "asked").read_text()
        before = self._dense(folder / "base")
        if not again:
            return small.merged_problem(folder / "out", before, small.updates())
        # Quantized anew: each weight is near what it must be, and those that nothing was added to are as they were.
        after = self._dense(folder / "out")
        if after.keys() != before.keys():
            return f"quantized again, it has other tensors: {sorted(after.keys() ^ before.keys())[:4]}"
        deltas = small.updates()
        for name, (value, _) in before.items():
            wanted, found = value + deltas.get(name, 0.0), after[name][0]
            off, most = (found - wanted).abs().max(), wanted.abs().max() + value.abs().max() + 1e-30
            if name not in deltas and torch.equal(found.nan_to_num(), value.nan_to_num()):
                continue
            if not found.is_floating_point() or found.shape != wanted.shape:
                return f"quantized again, {name} is another one"
            # Scales that stay may be too small for what was added.
            if not off <= (1.0 if name in deltas else 2.0**-7) * most:
                return f"quantized again, {name} is off by {float(off):.3g} of {float(most):.3g}"
        return None

    def _dense(self, base: Path) -> dict[str, tuple[Any, Any]]:
        from safetensors import safe_open
        from safetensors.torch import load_file

        config = json.loads((base / "config.json").read_bytes())
        settings = config.get(self.key)
        try:
            with safe_open(base / "model.safetensors", "pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(base / "model.safetensors")
            dense, taken = self.meaning(tensors, settings if isinstance(settings, dict) else {}, metadata)
        except Unjudged:
            raise
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:300]) from problem
        left = {name: value for name, value in tensors.items() if name not in taken}
        return small.as_they_are(left) | dense


def _damage_metadata(path: Path, random: Random) -> str:
    """Change what the header says of one weight."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = random.choice(sorted(metadata))
    if metadata[name].startswith("{"):
        entry, how = damage_tree(json.loads(metadata[name]), random)
        metadata[name] = json.dumps(entry)
    else:
        metadata[name], how = random.choice(("", "x", "{}", "[")), "another text"
    metadata = {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}
    save_file(load_file(path), path, metadata)
    return f"header of {name}: {how}"


def _damage_text_tensor(path: Path, random: Random) -> str:
    """Change the JSON in the tensor that bitsandbytes keeps it in."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = random.choice(sorted(one for one in tensors if ".quant_state." in one))
    entry, how = damage_tree(json.loads(bytes(tensors[name].tolist())), random)
    raw = json.dumps(entry).encode("utf-8", "replace")
    tensors[name] = torch.tensor(list(raw), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    return f"{name}: {how}"


FORMATS: tuple[tuple[str, dict[str, Any], layers.Linear, meaning.Meaning], ...] = (
    ("fp8", layers.FP8, layers.fp8, meaning.fp8),
    (
        "modelopt fp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        layers.modelopt,
        meaning.modelopt,
    ),
    ("modelopt fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, layers.modelopt8, meaning.modelopt),
    ("bitsandbytes 4 bits, nf4", layers.bnb("nf4", True), layers.four_bits("nf4", True), meaning.bitsandbytes),
    ("bitsandbytes 4 bits, fp4", layers.bnb("fp4", False), layers.four_bits("fp4", False), meaning.bitsandbytes),
    (
        "bitsandbytes int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
        layers.eight_bits,
        meaning.bitsandbytes,
    ),
    ("compressed-tensors packed", layers.said("pack-quantized", **layers.PACKED), layers.packed, meaning.compressed),
    ("compressed-tensors int8", layers.said("int-quantized", **layers.CHANNELS), layers.channels, meaning.compressed),
    ("compressed-tensors nvfp4", layers.said("nvfp4-pack-quantized", **layers.NVFP4), layers.nvfp4, meaning.compressed),
    ("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, layers.mxfp4, meaning.mxfp4),
    ("torchao, integers", {"quant_method": "torchao"}, layers.torchao, meaning.torchao),
    ("torchao, float8", {"quant_method": "torchao"}, layers.torchao8, meaning.torchao),
    ("gptq", layers.GPTQ, layers.gptq, meaning.gptq),
    ("awq", layers.AWQ, layers.awq, meaning.awq),
    ("mlx", {"group_size": 32, "bits": 4}, layers.mlx(".biases"), meaning.mlx),
    ("metal", {"quant_method": "metal", "group_size": 32, "bits": 4}, layers.mlx(".qbiases"), meaning.mlx),
)
SUBJECTS: list[Subject] = [
    QuantizedBase(
        kind,
        place,
        settings,
        linear,
        what,
        "float16" if kind in ("gptq", "awq") else "bfloat16",
        "quantization" if kind == "mlx" else "quantization_config",
    )
    for kind, settings, linear, what in FORMATS
    for place in ("config", "tensors")
]
