"""PEFT, transformers and PyTorch run the trainer; what came with base and adapter gives them nothing else to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import edit_json, make_adapter, make_base
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, HiraConfig, KasaConfig, LoraConfig, PeftType
from safetensors.torch import load_file

from fossil_export import FossilExportError, export_onnx, merge, verify
from fossil_export._foreign import load_model, model_class, read_config, trusting
from fossil_export.verifying._models import TorchRunner, tokenize
from fossil_export.verifying._prompts import PROMPTS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a LoRA on it."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", shards="1GB")
    make_adapter(folder / "adapter", base, kind=LoraConfig, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def adapter(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "adapter", tmp_path / "adapter")


def forward(base: Path, adapter: Path, merged: Path) -> Any:
    merge(adapter, merged, base=base)
    return verify(merged, base=base, adapter=adapter, level="forward")


FIELDS: dict[str, Any] = {
    "megatron_config": {"a": 1},
    "megatron_core": "megatron.planted",
    "corda_config": {"cache_file": "planted.bin", "covariance_file": "planted.bin"},
    "eva_config": {"rho": 2.0, "planted": True},
    "loftq_config": {"loftq_bits": 4, "planted": "planted.bin"},
    "lora_ga_config": {"cache_file": "planted.bin"},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "auto_mapping": {"base_model_class": "Model", "parent_library": "megatron.planted"},
    "layer_replication": None,
    "arrow_config": None,
}


def test_fields_of_the_training(adapter: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "installed" / "megatron" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.setattr(torch, "load", None)
    edit_json(adapter / "adapter_config.json", **FIELDS)
    (adapter / "planted.bin").write_bytes(b"no pickle")
    assert forward(models / "base", adapter, tmp_path / "merged").parity
    assert not (tmp_path / "ran").exists()


NEWER: dict[str, dict[str, Any]] = {
    "its version": {"transformers_version": "5.3.0", "scale_decoder_outputs": ..., "rope_parameters": ...},
    "rotary embeddings": {"transformers_version": ..., "rope_parameters": {"rope_theta": 5e5}, "rope_theta": ...},
    "rotary embeddings of a part": {"transformers_version": ..., "text_config": {"rope_parameters": {}}},
    "T5 without scaling": {"transformers_version": ..., "scale_decoder_outputs": False},
}


@pytest.mark.parametrize("written", NEWER)
def test_a_config_of_a_newer_transformers_is_read_by_no_older_one(
    written: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4 makes another model of it, in silence, by which a right artifact and a wrong one are judged."""
    base = shutil.copytree(models / "base", tmp_path / "base")
    edit_json(base / "config.json", **{"rope_parameters": ..., **NEWER[written]})
    monkeypatch.setattr("fossil_export._foreign.version", lambda package: "4.57.6")
    with pytest.raises(FossilExportError, match=r"config\.json: .*4\.57\.6 .*pip install 'transformers>=5'"):
        read_config(base)
    edit_json(base / "config.json", **dict.fromkeys([*NEWER[written], "rope_parameters"], ...))
    read_config(base)


def test_a_config_of_a_somewhat_newer_transformers_is_told(models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    assert not forward(base, models / "adapter", tmp_path / "merged").warnings
    edit_json(base / "config.json", transformers_version="5.2000.0.dev0")
    found = forward(base, models / "adapter", tmp_path / "again")
    assert found.parity and len(found.warnings) == 1
    assert "transformers 5.2000.0.dev0" in found.warnings[0] and "pip install --upgrade" in found.warnings[0]


class Older(LoraConfig):
    """The config of a PEFT that passes over KaSA, as 0.18 does."""

    __dataclass_fields__: ClassVar[dict[str, Any]] = {
        name: field for name, field in LoraConfig.__dataclass_fields__.items() if name != "kasa_config"
    }

    @classmethod
    def from_pretrained(cls, *given: Any, **options: Any) -> LoraConfig:
        config: LoraConfig = LoraConfig.from_pretrained(*given, **options)
        config.kasa_config = None
        return config


def test_what_an_older_peft_passes_over_is_not_left_to_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(
        tmp_path / "adapter", models / "base", kind=LoraConfig, kasa_config=KasaConfig(), target_modules=["q_proj"]
    )
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA, Older)
    assert forward(models / "base", tmp_path / "adapter", tmp_path / "merged").parity


def test_a_method_of_a_newer_peft_says_so(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "adapter", models / "base", kind=HiraConfig, target_modules=["embed_tokens"])
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.HIRA)
    with pytest.raises(FossilExportError, match=r"does not know HIRA: pip install --upgrade peft"):
        forward(models / "base", tmp_path / "adapter", tmp_path / "merged")


def pickled(models: Path, folder: Path) -> Path:
    base = shutil.copytree(models / "base", folder)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def test_pickles_of_base_and_adapter(
    adapter: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, base = adapter / "adapter_model.safetensors", pickled(models, tmp_path / "base")
    state = {name: value.to(torch.bfloat16) for name, value in load_file(weights).items()}
    torch.save(state, adapter / "adapter_model.bin")
    weights.unlink()
    monkeypatch.setattr(torch, "load", None)  # before 2.6 it could be made to run code, whatever it was asked
    assert forward(base, adapter, tmp_path / "merged").parity


def test_a_graph_of_a_pickled_base(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that leaves the weights as they are has the graph made of the base's own folder, if it can."""
    base = pickled(models, tmp_path / "base")

    def build(model: Path, output: Path, precision: str, device: str) -> Path:
        raise FossilExportError(f"was given {sorted(path.name for path in model.iterdir() if 'model' in path.name)}")

    monkeypatch.setattr("fossil_export.onnx.builders._torch.build", build)
    with pytest.raises(FossilExportError, match=r"was given \['model\.safetensors'\]"):
        export_onnx(models / "adapter", tmp_path / "out", base=base, runtime="torch", mode="swappable")


GREEDY = [
    {"penalty_alpha": 0.6, "top_k": 4},
    {"custom_generate": "someone/generation"},
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"dola_layers": "high"},
    {"repetition_penalty": 5.0, "max_length": 3, "stop_strings": ["a"], "prompt_lookup_num_tokens": 2},
    {"assistant_early_exit": 1},
]


@pytest.mark.parametrize("settings", GREEDY, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("trust", [False, True])
def test_generation_is_plain_and_greedy(settings: dict[str, Any], trust: bool, models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    plain = generated(base, trust)
    (base / "generation_config.json").write_text(json.dumps(settings))
    (base / "custom_generate").mkdir()
    ran = tmp_path / "ran"
    (base / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w')\ndef generate(model, **o): pass\n")
    assert generated(base, trust) == plain and len(plain) == 6
    assert trust or not ran.exists()  # transformers imports it of a folder that is trusted


def generated(folder: Path, trust: bool) -> list[int]:
    with trusting(trust):
        config = read_config(folder)
        model = load_model(model_class(config, "AutoModelForCausalLM"), folder, config)
        found = TorchRunner(model, "cpu").generate([5, 6, 7], 6)
    assert found is not None
    return found


TOKENIZERS: dict[str, dict[str, Any]] = {
    "panic": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no exception of its own": {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_fail(kind: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    plain = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    made = {"version": "1.0", "model": plain, "added_tokens": []} | TOKENIZERS[kind]
    (base / "tokenizer.json").write_text(json.dumps(made))
    edit_json(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    found = tokenize(base, PROMPTS)
    assert len(found) == len(PROMPTS) and all(found)
    assert "panicked" not in capfd.readouterr().err
