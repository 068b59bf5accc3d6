"""GGUF LoRA files, read back with gguf's own reader and held against PEFT's update; what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import edit_json, make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert
from fossil_export.converting.gguf_lora import FAMILIES

Array = np.ndarray[Any, Any]

HIDDEN, INNER, HEADS, GROUPS, WIDTH, VOCABULARY = 48, 96, 4, 2, 16, 120
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Kind:
    """A model of transformers and what llama.cpp makes of it: its name, whether q and k are reordered."""

    config: str
    architecture: str
    rotary: bool
    targets: tuple[str, ...] = tuple(SEPARATE)


KINDS = {
    "llama": Kind("LlamaConfig", "llama", True),
    "mistral": Kind("MistralConfig", "llama", True),
    "smollm3": Kind("SmolLM3Config", "smollm3", True),
    "granite": Kind("GraniteConfig", "granite", True),
    "qwen2": Kind("Qwen2Config", "qwen2", False),
    "qwen3": Kind("Qwen3Config", "qwen3", False),
    "gemma": Kind("GemmaConfig", "gemma", False),
    "gemma2": Kind("Gemma2Config", "gemma2", False),
    "gemma3_text": Kind("Gemma3TextConfig", "gemma3", False),
    "phi3": Kind("Phi3Config", "phi3", False, tuple(PACKED)),
}


def make_kind(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model of a family with random weights; where the family has one, heads wider than hidden / heads."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind not in {"qwen2", "phi3", "granite", "smollm3"}:
        sizes["head_dim"] = WIDTH
    config = getattr(transformers, KINDS[kind].config)(**sizes | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@dataclass
class Case:
    base: Path
    adapter: Path
    trained: Any

    def update(self, module: str) -> Array:
        """PEFT's update (out, in) of a module, on a weight of zeros, so that nothing is rounded away."""
        layer = self.trained.base_model.model.get_submodule(module)
        blank = torch.zeros_like(layer.get_base_layer().weight)
        value: Array = layer.get_delta_weight_miss("default", blank).detach().numpy()
        return value

    def write(self, output: Path, **options: Any) -> dict[str, Any]:
        made = convert(self.adapter, output, to="gguf-lora", **{"base": self.base, **options})
        return {**made.details, "warnings": list(made.warnings)}


def make(folder: Path, kind: str = "llama", config: dict[str, Any] | None = None, **changes: Any) -> Case:
    base = make_kind(folder / "base", kind, **(config or {}))
    changes.setdefault("target_modules", list(KINDS[kind].targets))
    trained = make_adapter(folder / "adapter", base, **changes)
    return Case(base, folder / "adapter", trained)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make(tmp_path)


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], Array]]:
    """Type, NumPy shape and values in float32 of every tensor of a file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        found[tensor.name] = (tensor.tensor_type.name, shape, values)
    return found


def restored(rows: Array, heads: int) -> Array:
    """transformers' order of rows that llama.cpp keeps pairwise: of a head's rows, the even ones, then the odd ones."""
    width = len(rows) // heads
    order = [head * width + half + 2 * i for head in range(heads) for half in (0, 1) for i in range(width // 2)]
    return rows[order]


def in_order(rows: Array, module: str, rotary: bool) -> Array:
    heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(module.rpartition(".")[2])
    return restored(rows, heads) if rotary and heads else rows


def without_head(case: Case) -> None:
    """PEFT stores a targeted head beside its shard unless told otherwise."""
    case.trained.save_pretrained(case.adapter, save_embedding_layers=False)


def gguf_name(module: str) -> str:
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def test_kinds_are_all_tested() -> None:
    assert set(FAMILIES) == {*KINDS, "gemma3"}  # gemma3 is gemma3_text within a model that also sees


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str, tmp_path: Path) -> None:
    expected = KINDS[kind]
    case = make(tmp_path, kind, r=10)  # divides neither width
    output = tmp_path / "adapter.gguf"
    details = case.write(output)
    found = tensors(output)
    modules = [
        f"model.layers.{layer}.{part}"
        for layer in range(2)
        for part in NAMES
        if part.rpartition(".")[2] in expected.targets
    ]
    assert set(found) == {f"{gguf_name(module)}.{end}" for module in modules for end in ("lora_a", "lora_b")}
    for module in modules:
        update = case.update(module)
        (kind_a, shape_a, a), (kind_b, shape_b, b) = (
            found[f"{gguf_name(module)}.{end}"] for end in ("lora_a", "lora_b")
        )
        assert (kind_a, kind_b) == ("F32", "F32")
        assert (shape_a, shape_b) == ((10, update.shape[1]), (len(update), 10))
        assert np.abs(update).max() > 0
        assert np.array_equal(in_order(b @ a, module, expected.rotary), update)
        if expected.rotary and module.endswith(("q_proj", "k_proj")):
            assert not np.array_equal(b @ a, update)
    reader = gguf.GGUFReader(output)
    keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("general", "adapter"))}
    assert keys["general.architecture"] == details["architecture"] == expected.architecture
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 10.0)
    assert (keys["general.name"], keys["general.base_model.0.name"]) == ("adapter", "base")
    assert keys["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert details == {
        "architecture": expected.architecture,
        "outtype": "f32",
        "rank": 10,
        "modules": len(modules),
        "exact": True,
        "relative_error": 0.0,
        "warnings": [],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "base"]


def test_mini(tmp_path: Path) -> None:
    case = make(tmp_path, r=8, init_weights="mini", mini_r=4)
    case.write(tmp_path / "adapter.gguf")
    found = tensors(tmp_path / "adapter.gguf")
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
        name = gguf_name(module)
        product = found[f"{name}.lora_b"][2] @ found[f"{name}.lora_a"][2]
        assert np.array_equal(in_order(product, module, True), case.update(module))


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_rounded(outtype: str, tmp_path: Path) -> None:
    case = make(tmp_path, r=32)
    details = case.write(tmp_path / "exact.gguf")
    exact = tensors(tmp_path / "exact.gguf")
    details = case.write(tmp_path / "rounded.gguf", outtype=outtype)
    rounded = tensors(tmp_path / "rounded.gguf")
    assert rounded.keys() == exact.keys()
    largest, kinds = 0.0, set()
    for name, (_, shape, values) in exact.items():
        kind, stored_shape, stored = rounded[name]
        assert stored_shape == shape
        kinds.add((kind, shape[-1] % 32 == 0))
        if kind == "Q8_0":
            blocks, codes = values.reshape(-1, 32), stored.reshape(-1, 32)
            # Half a step of 1/127 of the largest, and the float16 scale's own rounding on up to 127 steps.
            bound = np.abs(blocks).max(1, keepdims=True) * (0.5 / 127 + 2**-11)
            assert (np.abs(codes - blocks) <= bound * 1.001).all()
        else:
            assert np.array_equal(stored, values.astype(np.float16).astype(np.float32))
        if name.endswith("lora_b"):
            largest = max(largest, float(np.linalg.norm(stored - values) / np.linalg.norm(values)))
    assert kinds == ({("F16", True), ("F16", False)} if outtype == "f16" else {("Q8_0", True), ("F16", False)})
    assert details["relative_error"] == pytest.approx(largest, rel=1e-3)
    assert 0 < details["relative_error"] < (5e-4 if outtype == "f16" else 1e-2)
    assert not details["exact"]
    stay = "10 of 28 matrices stay f16" if outtype == "q8_0" else ""
    assert [warning[: len(stay)] for warning in details["warnings"]] == ([stay] if stay else [])
    written = gguf.GGUFReader(tmp_path / "rounded.gguf").fields["general.file_type"].contents()
    assert written == {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[outtype]


def test_values_too_small_for_q8_0_are_told(tmp_path: Path) -> None:
    def faint(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    case = make(tmp_path, r=32, change=faint)
    warnings = case.write(tmp_path / "adapter.gguf", outtype="q8_0")["warnings"]
    assert "--outtype f32 keeps it" in warnings[1]


def test_bfloat16_shards_are_exact_in_f32(tmp_path: Path) -> None:
    base = make_kind(tmp_path / "base", "llama")
    trained = make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16, autocast=False)
    assert Case(base, tmp_path / "adapter", trained).write(tmp_path / "adapter.gguf")["exact"]
    shards = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shard = shards["base_model.model.model.layers.0.mlp.up_proj.miss_block"]
    assert shard.dtype == torch.bfloat16
    assert np.array_equal(
        tensors(tmp_path / "adapter.gguf")["blk.0.ffn_up.weight.lora_b"][2], shard.T.to(torch.float32).numpy()
    )


def test_head_of_its_own(tmp_path: Path) -> None:
    case = make(tmp_path, target_modules=["lm_head"])
    refused(r"\(lm_head.weight\).* save_embedding_layers=False\) if they are the base's own", case, tmp_path)
    without_head(case)
    case.write(tmp_path / "adapter.gguf")
    found = tensors(tmp_path / "adapter.gguf")
    assert set(found) == {"output.weight.lora_a", "output.weight.lora_b"}
    assert np.array_equal(found["output.weight.lora_b"][2] @ found["output.weight.lora_a"][2], case.update("lm_head"))


@pytest.mark.parametrize("head", ["model.language_model.", "language_model.model."])
def test_text_part_of_a_model_that_also_sees(head: str, tmp_path: Path) -> None:
    case = make(tmp_path, "gemma3_text")
    case.write(tmp_path / "plain.gguf")
    weights = case.adapter / "adapter_model.safetensors"
    renamed = {name.replace("model.layers.", f"{head}layers."): value for name, value in load_file(weights).items()}
    assert all(f"base_model.model.{head}layers." in name for name in renamed)
    save_file(renamed, weights)
    text = json.loads((case.base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    case.write(tmp_path / "adapter.gguf", base=None, base_config=tmp_path / "config.json")
    one, other = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "adapter.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name][2], other[name][2]) for name in one)


def test_config_alone_is_enough(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path / "whole.gguf")
    (tmp_path / "config").mkdir()
    (case.base / "config.json").rename(tmp_path / "config" / "config.json")
    case.write(tmp_path / "config.gguf", base=None, base_config=tmp_path / "config")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "config.gguf").read_bytes()


def test_config_that_does_not_tell_the_heads_of_the_keys(tmp_path: Path) -> None:
    """Old ones do not: there are as many as of the queries."""
    case = make(tmp_path, config={"num_key_value_heads": HEADS})
    case.write(tmp_path / "told.gguf")
    edit_json(case.base / "config.json", num_key_value_heads=...)
    case.write(tmp_path / "untold.gguf")
    assert (tmp_path / "told.gguf").read_bytes() == (tmp_path / "untold.gguf").read_bytes()


def refused(match: str, case: Case, tmp_path: Path, **options: Any) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FossilExportError, match=match) as caught:
        case.write(tmp_path / "out.gguf", **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_bat_is_refused(tmp_path: Path) -> None:
    refused("bat adapter.*--to lora with --rank", make(tmp_path, r=8, init_weights="bat"), tmp_path)


def test_whole_trained_tensors_are_refused(tmp_path: Path) -> None:
    refused(
        r"whole trained tensors \(lm_head.weight\).*merge it", make(tmp_path, modules_to_save=["lm_head"]), tmp_path
    )


def test_biases_are_refused(tmp_path: Path) -> None:
    case = make(tmp_path, "qwen2", bias="miss_only", target_modules=["q_proj"])
    refused(r"whole trained tensors \(model.layers.0.self_attn.q_proj.bias", case, tmp_path)


@pytest.mark.parametrize("declared", [True, None])
def test_tied_head_is_refused(declared: bool | None, tmp_path: Path) -> None:
    """Also where only transformers' default for the family ties it."""
    case = make(tmp_path, "gemma", target_modules=["lm_head"])
    without_head(case)
    edit_json(case.base / "config.json", tie_word_embeddings=... if declared is None else declared)
    refused("ties lm_head to the embedding.*merge the adapter", case, tmp_path)


def test_module_without_a_tensor(tmp_path: Path) -> None:
    case = make(tmp_path)
    weights = case.adapter / "adapter_model.safetensors"
    strange = "model.vision_tower.layers.0.self_attn.q_proj"
    shards = load_file(weights)
    shards[f"base_model.model.{strange}.miss_block"] = shards[
        "base_model.model.model.layers.0.self_attn.q_proj.miss_block"
    ]
    save_file({name: value.clone() for name, value in shards.items()}, weights)
    refused(f"llama has no tensor for {strange};", case, tmp_path, base=None, base_config=case.base)


def test_layer_that_the_base_lacks(case: Case, tmp_path: Path) -> None:
    edit_json(case.base / "config.json", num_hidden_layers=1)
    refused("no tensor for model.layers.1.mlp.down_proj,.* and 2 more;", case, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'.*known for llama"),
        ({"model_type": ...}, "model_type is None"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not halve the 32 rows of model.layers.0"),
    ],
)
def test_config_that_does_not_tell(change: dict[str, Any], match: str, case: Case, tmp_path: Path) -> None:
    edit_json(case.base / "config.json", **change)
    refused(match, case, tmp_path)


def test_no_config(case: Case, tmp_path: Path) -> None:
    (case.base / "config.json").unlink()
    refused("has no config.json.*name its folder with --base", case, tmp_path)
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path=None)
    refused("does not name its base model.*--base", case, tmp_path, base=None)


def test_numbers_that_are_none(case: Case, tmp_path: Path, **options: Any) -> None:
    """Found in the last shard, when all others are written."""
    weights = case.adapter / "adapter_model.safetensors"
    shards = load_file(weights)
    shards["base_model.model.model.layers.1.self_attn.v_proj.miss_block"][3, 4] = torch.nan
    save_file(shards, weights)
    refused("layers.1.self_attn.v_proj.miss_block holds infinite or NaN", case, tmp_path, **options)


@pytest.mark.parametrize(("outtype", "value"), [("f16", 7e4), ("q8_0", 1e7)])
def test_numbers_that_the_format_cannot_hold(outtype: str, value: float, case: Case, tmp_path: Path) -> None:
    weights = case.adapter / "adapter_model.safetensors"
    shards = load_file(weights)
    shards["base_model.model.model.layers.1.self_attn.q_proj.miss_block"][3, 4] = -value
    save_file(shards, weights)
    refused(
        f"layers.1.self_attn.q_proj holds .*, more than {outtype} can; use --outtype f32",
        case,
        tmp_path,
        outtype=outtype,
    )
    assert case.write(tmp_path / "out.gguf")["exact"]


def test_options_that_make_no_sense(case: Case, tmp_path: Path) -> None:
    refused("outtype is 'q4_0', expected f32, f16, q8_0", case, tmp_path, outtype="q4_0")
    refused("--to gguf-lora takes no --rank, which is for lora; leave it out", case, tmp_path, rank=4)


def test_output_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match="is a folder; name a file"):
        (tmp_path / "folder").mkdir()
        case.write(tmp_path / "folder")
    with pytest.raises(FossilExportError, match="cannot be written: its folder does not exist"):
        case.write(tmp_path / "nowhere" / "adapter.gguf")


def test_an_earlier_file_stays_when_writing_fails(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"GGUF, earlier")
    test_numbers_that_are_none(case, tmp_path, overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"GGUF, earlier"


def test_missing_library(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"writing GGUF needs gguf: pip install 'fossil-export\[gguf\]'", case, tmp_path)
