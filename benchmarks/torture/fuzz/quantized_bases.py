"""Quantized bases of every format that is read: damage to what the config says of them, and to their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torture.fuzz import quantized_meaning as meaning
from torture.fuzz import small
from torture.fuzz.mutations import damage_tree
from torture.fuzz.subject import Subject, Unjudged
from torture.fuzz.tensor_damage import damage_tensors

Tensors = dict[str, Any]
Linear = Callable[[int, int, Any], Tensors]
"""(rows, columns, generator) → the tensors of a linear layer, by the ends of their names."""

OPTIONS: tuple[tuple[str, ...], ...] = ((), (), (), ("--requantize", "--min-survival", "0"), ("--dtype", "float32"))


@dataclass(frozen=True)
class QuantizedBase:
    """A base whose linear layers are `linear`, under `settings`; `place` ("config" or "tensors") is damaged."""

    kind: str
    place: str
    settings: dict[str, Any]
    linear: Linear
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
            metadata |= {f"{module}.weight": json.dumps(TORCHAO[self.kind]) for module in modules}
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


def _random(generator: Any, shape: Any, dtype: Any = None) -> Any:
    import torch

    found = torch.randn(shape, generator=generator) * 0.05
    return found if dtype is None else found.to(dtype)


def _whole(generator: Any, low: int, high: int, shape: Any) -> Any:
    import torch

    return torch.randint(low, high, shape, generator=generator)


def _words(codes: Any, bits: int) -> Any:
    """Codes (n, m) as rows of words of 32 bits (n, m · bits / 32), the lowest bits first."""
    import numpy as np
    import torch

    every = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(every.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


def _scales(generator: Any, shape: Any, dtype: Any) -> Any:
    return (_random(generator, shape).abs() + 0.01).to(dtype)


def _fp8(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = (_random(generator, (rows, columns)) * 1000).to(torch.float8_e4m3fn)
    grid = _scales(generator, (-(-rows // 32), -(-columns // 32)), torch.float32)
    return {".weight": codes, ".weight_scale_inv": grid * 0.01}


def _modelopt(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = _whole(generator, 0, 256, (rows, columns // 2)).to(torch.uint8)
    scales = (_scales(generator, (rows, columns // 16), torch.float32) * 1000).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales, ".weight_scale_2": torch.tensor(0.0003)}


def _modelopt8(rows: int, columns: int, generator: Any) -> Tensors:
    own = _fp8(rows, columns, generator)
    return {".weight": own[".weight"], ".weight_scale": own[".weight_scale_inv"].flatten()[0]}


def _gptq(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".qweight": _words(_whole(generator, 0, 16, (rows, columns)), 4).T,
        ".qzeros": _words(_whole(generator, 0, 15, (groups, rows)), 4),
        ".scales": _scales(generator, (groups, rows), torch.float16),
        ".g_idx": (torch.arange(columns) // 32).int(),
    }


def _awq(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".qweight": _words(_whole(generator, 0, 16, (columns, rows)), 4),
        ".qzeros": _words(_whole(generator, 0, 16, (groups, rows)), 4),
        ".scales": _scales(generator, (groups, rows), torch.float16),
    }


def _mlx(biases: str) -> Linear:
    def made(rows: int, columns: int, generator: Any) -> Tensors:
        import torch

        groups = columns // 32
        return {
            ".weight": _words(_whole(generator, 0, 16, (rows, columns)), 4).view(torch.uint32),
            ".scales": _scales(generator, (rows, groups), torch.bfloat16),
            biases: _random(generator, (rows, groups), torch.bfloat16),
        }

    return made


def _torchao(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    return {
        "._weight_qdata": _whole(generator, -8, 8, (rows, columns)).to(torch.int8),
        "._weight_scale": _scales(generator, (rows, columns // 32), torch.bfloat16),
        "._weight_zero_point": _whole(generator, -8, 8, (rows, columns // 32)).to(torch.int8),
    }


def _torchao8(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    return {
        "._weight_qdata": _fp8(rows, columns, generator)[".weight"],
        "._weight_scale": _scales(generator, (rows, columns // 32), torch.float32),
    }


def _of_dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


TORCHAO: dict[str, Any] = {
    "torchao, integers": {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": _of_dtype("int4"),
            "block_size": [1, 32],
            "dtype": _of_dtype("bfloat16"),
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    },
    "torchao, float8": {
        "_type": "Float8Tensor",
        "_data": {
            "block_size": [1, 32],
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": _of_dtype("bfloat16"),
        },
        "_tensor_data_names": ["qdata", "scale"],
    },
}


def _four_bits(kind: str, nested: bool) -> Linear:
    def made(rows: int, columns: int, generator: Any) -> Tensors:
        import bitsandbytes as bnb
        import torch

        value = _random(generator, (rows, columns), torch.bfloat16)
        codes, state = bnb.functional.quantize_4bit(value, quant_type=kind, compress_statistics=nested)
        return {".weight": codes} | {f".weight.{key}": one for key, one in state.as_dict(packed=True).items()}

    return made


def _eight_bits(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    scales = _scales(generator, (rows,), torch.float32)
    codes = _whole(generator, -127, 128, (rows, columns)).to(torch.int8)
    return {".weight": codes, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}


def _packed(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    groups = columns // 32
    return {
        ".weight_packed": _words(_whole(generator, 0, 16, (rows, columns)), 4),
        ".weight_scale": _scales(generator, (rows, groups), torch.bfloat16),
        ".weight_zero_point": _words(_whole(generator, 0, 16, (groups, rows)), 4).T,
        ".weight_shape": torch.tensor([rows, columns]),
    }


def _channels(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    own = _eight_bits(rows, columns, generator)
    return {".weight": own[".weight"], ".weight_scale": own[".SCB"].reshape(-1, 1).to(torch.bfloat16)}


def _nvfp4(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    own = _modelopt(rows, columns, generator)
    overall = torch.tensor([3000.0])
    return {".weight_packed": own[".weight"], ".weight_scale": own[".weight_scale"], ".weight_global_scale": overall}


def _mxfp4(rows: int, columns: int, generator: Any) -> Tensors:
    import torch

    codes = _whole(generator, 0, 256, (2, rows, columns // 32, 16)).to(torch.uint8)
    return {"_blocks": codes, "_scales": _whole(generator, 117, 123, (2, rows, columns // 32)).to(torch.uint8)}


def _said(form: str, **weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _bnb(kind: str, nested: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
    }


_PACKED = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
_CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True, "damp_percent": 0.1}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
_FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}

FORMATS: tuple[tuple[str, dict[str, Any], Linear, meaning.Meaning], ...] = (
    ("fp8", _FP8, _fp8, meaning.fp8),
    ("modelopt fp4", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, _modelopt, meaning.modelopt),
    ("modelopt fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, _modelopt8, meaning.modelopt),
    ("bitsandbytes 4 bits, nf4", _bnb("nf4", True), _four_bits("nf4", True), meaning.bitsandbytes),
    ("bitsandbytes 4 bits, fp4", _bnb("fp4", False), _four_bits("fp4", False), meaning.bitsandbytes),
    (
        "bitsandbytes int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
        _eight_bits,
        meaning.bitsandbytes,
    ),
    ("compressed-tensors packed", _said("pack-quantized", **_PACKED), _packed, meaning.compressed),
    ("compressed-tensors int8", _said("int-quantized", **_CHANNELS), _channels, meaning.compressed),
    ("compressed-tensors nvfp4", _said("nvfp4-pack-quantized", **_NVFP4), _nvfp4, meaning.compressed),
    ("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, _mxfp4, meaning.mxfp4),
    ("torchao, integers", {"quant_method": "torchao"}, _torchao, meaning.torchao),
    ("torchao, float8", {"quant_method": "torchao"}, _torchao8, meaning.torchao),
    ("gptq", _GPTQ, _gptq, meaning.gptq),
    ("awq", _AWQ, _awq, meaning.awq),
    ("mlx", {"group_size": 32, "bits": 4}, _mlx(".biases"), meaning.mlx),
    ("metal", {"quant_method": "metal", "group_size": 32, "bits": 4}, _mlx(".qbiases"), meaning.mlx),
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
