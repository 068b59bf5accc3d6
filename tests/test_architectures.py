"""What an architecture is, asked of transformers and of the table that was made out of it: both say the same."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fossil_export.models import _names, _table, _transformers, make_table
from fossil_export.models._architecture import pattern_of

# All kinds of models, conversions and ties; the whole of transformers is compared by `make architectures-check`.
SAMPLE = """
albert bart beit bert bigbird_pegasus blip-2 bloom clip cohere csm deberta-v2 deepseek_v3 detr dinov2
distilbert ernie4_5_moe falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox gpt_oss granitemoe idefics3
internvl jamba lfm2_vl llama llava marian mamba mistral mistral3 mixtral modernbert mt5 nomic_bert olmo2 opt
paligemma phi phimoe qwen2 qwen2_5_vl qwen2_vl qwen3 qwen3_5 qwen3_moe roberta segformer siglip smollm3
starcoder2 switch_transformers t5 t5gemma vit wav2vec2 whisper xlm-roberta
"""

COMPOSITES = [
    ("llava", "LlavaForConditionalGeneration", {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}}),
    ("llava", "LlavaForConditionalGeneration", {"text_config": {"model_type": "mistral"}}),
    (
        "llava",
        "LlavaModel",
        {"text_config": {"model_type": "mixtral"}, "vision_config": {"model_type": "siglip_vision_model"}},
    ),
    ("llava_next", "LlavaNextForConditionalGeneration", {"text_config": {"model_type": "qwen3_moe"}}),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration", {"text_config": {"model_type": "llama"}}),
    ("paligemma", "PaliGemmaForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}),
    ("internvl", "InternVLForConditionalGeneration", {"text_config": {"model_type": "gpt_oss"}}),
    ("idefics3", "Idefics3ForConditionalGeneration", {"text_config": {"model_type": "qwen2"}}),
    ("mistral3", "Mistral3ForConditionalGeneration", {"text_config": {"model_type": "llama"}}),
    ("gemma3", "Gemma3ForConditionalGeneration", {"tie_word_embeddings": False}),
    (
        "blip-2",
        "Blip2ForConditionalGeneration",
        {"text_config": {"model_type": "t5"}, "use_decoder_only_language_model": False},
    ),
]


def compare(config, name):
    """Assert that both sources say the same of a class."""
    live, table = _transformers.read(config, name), _table.read(config, name)
    assert live is not None and table is not None
    assert live.shapes is not None and table.shapes is None
    assert sorted(n for n in live.shapes if not table.has(n)) == []
    for what in (
        "name",
        "model_type",
        "prefix",
        "embedding",
        "head",
        "follows_tie",
        "rules",
        "ignored",
        "optional",
        "parts",
    ):
        assert getattr(table, what) == getattr(live, what), what
    assert {tie.source for tie in live.ties if not is_tied(tie, table.ties)} == set()
    assert len(table.ties) > 0 or len(live.ties) == 0


def is_tied(tie, ties):
    """Whether one of the table's ties, whose names may be patterns, says of a parameter what the live one does."""
    return any(
        re.search("^" + other.target, tie.target)
        and replace(other, target="", source="") == replace(tie, target="", source="")
        for other in ties
    )


@pytest.mark.parametrize("model_type", SAMPLE.split())
def test_the_table_says_of_each_auto_class_what_transformers_says(model_type):
    classes = _table.classes(model_type)
    assert classes and classes.items() <= _transformers.classes(model_type).items()
    for name in sorted(set(classes.values())):
        compare({"model_type": model_type}, name)


@pytest.mark.parametrize(("model_type", "name", "changes"), COMPOSITES)
def test_a_model_made_of_others_is_put_together_from_their_lines(model_type, name, changes):
    compare({"model_type": model_type, **changes}, name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
        ({"model_type": "t5", "feed_forward_proj": "gated-gelu"}, "T5ForConditionalGeneration"),
        (
            {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            "T5ForConditionalGeneration",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "GPT2LMHeadModel"),
        ({"model_type": "bart", "tie_word_embeddings": False}, "BartForConditionalGeneration"),
        ({"model_type": "csm", "tie_codebooks_embeddings": False}, "CsmForConditionalGeneration"),
    ],
)
def test_the_table_knows_the_names_and_ties_of_other_configs(config, name):
    compare(config, name)


def test_the_keys_of_a_tie_untie_it():
    for model_type, name in (("llava", "LlavaForConditionalGeneration"), ("csm", "CsmForConditionalGeneration")):
        config = {"model_type": model_type, "text_config": {"model_type": "llama", "tie_word_embeddings": True}}
        if model_type == "csm":
            del config["text_config"]
        [tie] = _transformers.read(config, name).ties
        assert tie.on and tie.also
        for path in (tie.field, *tie.also):
            inner = config
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = False
        for read in (_transformers.read, _table.read):
            assert [one.on for one in read(config, name).ties] == [False]


def test_the_table_is_the_one_that_transformers_makes():
    sample = sorted({"bert", "clip", "csm", "gemma3", "gpt2", "llava", "llama", "qwen3_moe", "t5", "vit"})
    rows, _ = make_table.table(sample)
    kept = json.loads(_table._text())
    assert rows["made of"] == kept["made of"]
    assert {k: v for k, v in kept.items() if k.startswith("rules ")} == make_table.rules()
    for model_type in sample:
        ours, theirs = kept[model_type]["classes"], rows[model_type]["classes"]
        assert {name: ours[name] for name in theirs} == theirs
        assert kept[model_type].get("ties") == rows[model_type].get("ties")
        assert kept[model_type]["auto"] == rows[model_type]["auto"]


def test_the_table_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from fossil_export.models import _table as t; "
        "a = t.read({'model_type': 'llava'}, 'LlavaForConditionalGeneration'); assert a.rules and a.ties, a; "
        "assert len(t.model_types()) > 300; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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
    assert _transformers.read({**config, "num_hidden_layers": 90_000}, "LlamaForCausalLM") is None
    assert _transformers.read({**config, "num_hidden_layers": 1}, "LlamaForCausalLM") is not None  # no count is left


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


words = st.sampled_from(["a", "b", "layers", "*", "weight", "bias", "0"])


@given(st.sets(st.lists(words, min_size=1, max_size=5).map(".".join), max_size=30))
def test_packed_names_come_back(names):
    assert _names.unpack(_names.pack(names)) == names


def test_numbers_are_stars():
    assert pattern_of("layers.3.experts.12.w1.weight") == "layers.*.experts.*.w1.weight"


def test_a_part_of_a_kind_that_has_no_such_class_is_no_crash():
    config = {"model_type": "blip-2", "text_config": {"model_type": "vit"}}
    assert _table.read(config, "Blip2ForConditionalGeneration") is None
