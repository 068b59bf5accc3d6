"""What an architecture is, asked of transformers and of the table that was made out of it: both say the same."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_configs import CONFIGS
from torch import nn
from transformers import BertModel, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming

from fossil_export.models import _defaults, _lines, _names, _table, _transformers, make_table
from fossil_export.models._architecture import pattern_of

# All kinds of models, conversions and ties; the whole of transformers is compared by `make architectures-check`.
SAMPLE = """
albert bart beit bert bigbird_pegasus blip-2 bloom clip cohere csm deberta-v2 deepseek_v3 dinov2
distilbert ernie4_5_moe falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox gpt_oss granitemoe idefics3
internvl jamba lfm2 lfm2_vl llama llava marian mamba maskformer mask2former
mistral mistral3 mixtral modernbert mt5 nomic_bert olmo2 opt
paligemma phi phimoe qwen2 qwen2_5_vl qwen2_vl qwen3 qwen3_5 qwen3_moe roberta segformer siglip smollm3 speecht5
starcoder2 switch_transformers t5 t5gemma vit wav2vec2 whisper xlm-roberta
"""

# Made anew in a test, with the types of the models inside theirs.
CLOSED = "bart bert clip csm gemma3 gpt2 llava qwen3_moe speecht5 t5 vit"

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
    assert [t for t in live.ties if not any(about(o, t) and re.match(o.source, t.source) for o in table.ties)] == []
    assert [t for t in table.ties if not any(about(t, o) for o in live.ties)] == []


def about(tie, other):
    """Whether one of the table's ties, whose names may be patterns, is about the parameter of a live one."""
    same = replace(tie, target="", source="") == replace(other, target="", source="")
    return same and re.match(tie.target, other.target)


@pytest.mark.parametrize("model_type", SAMPLE.split())
def test_the_table_says_of_each_auto_class_what_transformers_says(model_type):
    classes = _table.classes(model_type)
    assert classes and classes.items() <= _transformers.classes(model_type).items()
    for name in sorted(set(classes.values())):
        compare(_defaults.content(model_type), name)


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
        ({"model_type": "deepseek_v3", "q_lora_rank": None}, "DeepseekV3ForCausalLM"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}, "Qwen3MoeForCausalLM"),
        ({"model_type": "opt", "word_embed_proj_dim": 384}, "OPTForCausalLM"),
        ({"model_type": "lfm2", "tie_embedding": True}, "Lfm2ForCausalLM"),
        ({"model_type": "lfm2", "tie_embedding": False}, "Lfm2ForCausalLM"),
        ({"model_type": "lfm2_vl", "text_config": {"tie_embedding": False}}, "Lfm2VlForConditionalGeneration"),
        ({"model_type": "depth_pro", "use_fov_model": True}, "DepthProForDepthEstimation"),
        ({"model_type": "t5gemma", "is_encoder_decoder": False}, "T5GemmaEncoderModel"),
    ],
)
def test_the_table_knows_the_names_and_ties_of_other_configs(config, name):
    compare(config, name)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_table_knows_the_models_that_people_use(model):
    compare(*CONFIGS[model])


def test_a_part_that_the_table_does_not_know_gives_none():
    assert _table.read({"model_type": "detr"}, "DetrForObjectDetection") is None  # its backbone is timm's
    whole = {"model_type": "llava", "text_config": {"model_type": "vit"}}
    assert _table.read({"model_type": "blip-2", **whole}, "Blip2ForConditionalGeneration") is None


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


def with_parts(model_types):
    """Model types with those of all models inside theirs."""
    todo, found = list(model_types), set()
    while todo:
        one = todo.pop()
        if one not in found and (row := _lines.line(one)) is not None:
            found.add(one)
            todo += row["parts"].values()
    return sorted(found)


def test_the_table_is_the_one_that_transformers_makes():
    sample = with_parts(CLOSED.split())
    rows, _ = make_table.table(sample)
    kept = json.loads(_lines.text())
    for name in (*sample, "made of", *(name for name in {**kept, **rows} if name.startswith("rules "))):
        assert rows.get(name) == kept.get(name), name


def _another_tie(patch):
    patch.setattr(LlamaForCausalLM, "_tied_weights_keys", {"lm_head.weight": "model.norm.weight"})


def _another_embedding(patch):
    patch.setattr(BertModel, "get_input_embeddings", lambda self: self.embeddings.position_embeddings)


def _another_head(patch):
    patch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: self.model.embed_tokens)


def _another_name(patch):
    made = LlamaForCausalLM.__init__

    def make(self, config):
        made(self, config)
        self.scale = nn.Parameter(self.lm_head.weight)

    patch.setattr(LlamaForCausalLM, "__init__", make)


def _another_rule(patch):
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    rules = conversion_mapping._checkpoint_conversion_mapping_cache
    patch.setitem(rules, "bert", [*rules.get("bert", []), WeightRenaming("one", "two")])


CHANGES = [
    (lambda patch: None, set()),
    (_another_tie, {"llama"}),
    (_another_embedding, {"bert"}),
    (_another_head, {"llama"}),
    (_another_name, {"llama"}),
    (_another_rule, {"rules bert"}),
]


@pytest.mark.parametrize(("change", "differ"), CHANGES)
def test_the_table_is_another_one_only_if_transformers_changes(monkeypatch, change, differ):
    change(monkeypatch)
    rows, _ = make_table.table(["bert", "llama"])
    kept = json.loads(_lines.text())
    assert {name for name in rows if rows[name] != kept.get(name)} == differ


@given(
    st.builds(
        lambda *parts: list(parts),
        st.sampled_from(["WeightRenaming", "WeightConverter"]),
        st.lists(st.sampled_from("abc"), min_size=1, max_size=2),
        st.lists(st.sampled_from("abc"), min_size=1, max_size=2),
        st.lists(st.lists(st.sampled_from("abc"), max_size=2), min_size=2, max_size=2),
        st.sampled_from([[], [["Chunk", {"dim": 0}]]]),
        st.sampled_from([0, 1]),
    )
)
def test_written_rules_come_back(rule):
    assert _lines.full(*_lines.short(rule)) == rule
    rule[3] = [rule[2], rule[1]]
    assert _lines.full(*_lines.short(rule)) == rule


def test_the_table_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from fossil_export.models import _table as t; "
        "a = t.read({'model_type': 'llava'}, 'LlavaForConditionalGeneration'); assert a.rules and a.ties, a; "
        "assert len(t.model_types()) > 300; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


words = st.sampled_from(["a", "b", "layers", "*", "weight", "bias", "0"])


@given(st.sets(st.lists(words, min_size=1, max_size=5).map(".".join), max_size=30))
def test_packed_names_come_back(names):
    assert _names.unpack(_names.pack(names)) == names


def test_numbers_are_stars():
    assert pattern_of("layers.3.experts.12.w1.weight") == "layers.*.experts.*.w1.weight"


def test_a_part_of_a_kind_that_has_no_such_class_is_no_crash():
    config = {"model_type": "blip-2", "text_config": {"model_type": "vit"}}
    assert _table.read(config, "Blip2ForConditionalGeneration") is None
