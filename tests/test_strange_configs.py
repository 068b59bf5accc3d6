"""Strange, absurd or malicious configs, and several threads at once: asking what an architecture is stays safe."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_configs import CONFIGS
from torch import nn

from fossil_export.models import _configs, _table, _transformers

STRANGE = [
    ({}, "LlamaForCausalLM"),
    ({"model_type": 3}, "LlamaForCausalLM"),
    ({"model_type": ["llama"]}, "LlamaForCausalLM"),
    ({"model_type": "no such type"}, "LlamaForCausalLM"),
    ({"model_type": "rules llama"}, "LlamaForCausalLM"),
    ({"model_type": "made of"}, "LlamaForCausalLM"),
    ({"model_type": 'llama": {'}, "LlamaForCausalLM"),
    ({"model_type": "llama"}, "BertModel"),
    ({"model_type": "llama"}, "NoSuchModel"),
    ({"model_type": "llama"}, "LlamaConfig"),
    ({"model_type": "llama"}, "torch.nn.Linear"),
    ({"model_type": "llama"}, None),
]


@pytest.mark.parametrize(("config", "name"), STRANGE)
@pytest.mark.parametrize("read", [_table.read, _transformers.read])
def test_what_is_not_known_is_none(read, config, name):
    assert read(config, name) is None


def _deep(levels):
    config = {"model_type": "llama"}
    for _ in range(levels):
        config = {"model_type": "llava", "text_config": config}
    return config


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "LlamaForCausalLM"),
        ({"model_type": "llama", "num_hidden_layers": 19_000}, "LlamaForCausalLM"),
        ({"model_type": "llama", "num_hidden_layers": -(10**12)}, "LlamaForCausalLM"),
        ({"model_type": "switch_transformers", "num_experts": 99_999}, "SwitchTransformersForConditionalGeneration"),
        (
            {"model_type": "llama", "num_hidden_layers": -1, "hidden_size": 0, "num_attention_heads": 0},
            "LlamaForCausalLM",
        ),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "LlamaForCausalLM"),
        ({"model_type": "bert", "num_labels": 10**12}, "BertForSequenceClassification"),
        ({"model_type": "qwen3_moe", "layer_types": ["full_attention"] * 10**6}, "Qwen3MoeForCausalLM"),
        (
            {"model_type": "distilbert", "max_position_embeddings": 10**12, "sinusoidal_pos_embds": True},
            "DistilBertModel",
        ),
        (_deep(2000), "LlavaForConditionalGeneration"),
    ],
)
def test_an_absurd_config_gives_none_soon(config, name):
    assert _transformers.read(config, name) is None
    _table.read(config, name)  # which counts nothing


def test_a_model_is_given_up_as_soon_as_it_is_too_large(monkeypatch):
    config = {"model_type": "llama", "num_hidden_layers": 3}
    assert _transformers.read(config, "LlamaForCausalLM") is not None
    monkeypatch.setattr(_transformers, "_MOST", 50)
    assert _transformers.read({**config, "num_hidden_layers": 1_900}, "LlamaForCausalLM") is None
    assert _transformers.read({**config, "num_hidden_layers": 1}, "LlamaForCausalLM") is not None  # no count is left


def test_what_other_threads_make_is_not_counted(monkeypatch):
    monkeypatch.setattr(_transformers, "_MOST", 5)
    with _transformers._counted(), ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(_linears, 9).result()) == 9
        with pytest.raises(_configs.Strange):
            _linears(9)


def _linears(count):
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)))


def test_threads_read_what_one_reads():
    asked = [CONFIGS[name] for name in ("gpt2", "bert-base", "Mistral-7B", "vit-base")] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: _transformers.read(*one), asked))
    assert found == [_transformers.read(*one) for one in asked]
    assert None not in found


def test_no_code_of_a_folder_is_run(tmp_path: Path, monkeypatch):
    flag = tmp_path / "ran"
    (tmp_path / "modeling_llama.py").write_text(f"open({str(flag)!r}, 'w')\nclass LlamaForCausalLM: pass\n")
    config = {
        "model_type": "llama",
        "auto_map": {"AutoConfig": "modeling_llama.X", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "_name_or_path": str(tmp_path),
        "num_hidden_layers": 1,
    }
    monkeypatch.chdir(tmp_path)
    whole = {"model_type": "llava", "text_config": config, "auto_map": {"AutoModel": "modeling_llama.X"}}
    assert _transformers.read(config, "LlamaForCausalLM").name == "LlamaForCausalLM"
    assert _transformers.read(whole, "LlavaForConditionalGeneration").parts["model.language_model"][1] == "LlamaModel"
    assert not flag.exists()
    assert _transformers.read({"model_type": "unknown", "auto_map": config["auto_map"]}, "LlamaForCausalLM") is None
