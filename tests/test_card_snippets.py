"""The snippets of a model card: they compile, and they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from card_tools import BASE, CONFIGS, FILES, LLAVA, TOKENIZER, facts, local, snippets
from conftest import make_adapter, make_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fossil_export.cards import Facts, model_card


def every_snippet() -> list[Facts]:
    tasks = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", None)
    heads = (
        "LlamaForCausalLM",
        "BertForMaskedLM",
        "ViTForImageClassification",
        "BertModel",
        "PegasusForConditionalGeneration",
    )
    found = [facts(kind, config={"task_type": task, "r": 8}) for kind in ("lora", "miss") for task in tasks]
    found += [facts(config={"architectures": [head], "auto_map": {}}) for head in heads]
    found += [
        facts(config=LLAVA),
        facts(files=("model.safetensors",)),
        local(files=("model.safetensors",)),
        local("lora"),
    ]
    found += [facts("onnx", files=("model.onnx", *more)) for more in ((), TOKENIZER, (*TOKENIZER, "a.onnx_adapter"))]
    return [*found, facts("onnx"), facts("onnx", files=(*FILES["onnx"], "chat_template.jinja"))]


@pytest.mark.parametrize("found", every_snippet())
def test_python_compiles(found: Facts) -> None:
    (code,) = snippets(model_card(found))
    compile(code, "snippet", "exec")
    assert len(max(code.splitlines(), key=len)) <= 120


def test_lines_for_servers() -> None:
    (line,) = snippets(model_card(facts("lora", config={**CONFIGS["lora"], "r": 50})), "bash")
    assert line == f"vllm serve {BASE} --enable-lora --max-lora-rank 64 --lora-modules mascot=ada/mascot"
    for none in ({"r": 1000}, {"modules_to_save": ["lm_head"]}, {"task_type": "SEQ_CLS"}):
        assert "vllm" not in model_card(facts("lora", config={**CONFIGS["lora"], **none}))
    assert "vllm serve" not in model_card(facts("miss"))
    card = model_card(facts("gguf-lora", files=("my mascot.gguf",)))
    assert "hf download ada/mascot 'my mascot.gguf' --local-dir .\n" in card
    assert "llama-server --model base.gguf --lora 'my mascot.gguf'\n" in card
    assert "FROM ./base.gguf\nADAPTER ./my mascot.gguf\n" in card
    assert 'set_active_adapter(adapters, "mine")' in model_card(facts("onnx"))
    assert "apply_chat_template" in model_card(facts("onnx", files=(*FILES["onnx"], "chat_template.jinja")))


def save_tokenizer(folder: Path, chat: bool = False) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "What", "is", "an", "ammonite", "?"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def published(folder: Path, **changes: Any) -> Facts:
    names = tuple(path.name for path in folder.iterdir())
    return facts(repo_id=str(folder), files=names, config=AutoConfig.from_pretrained(folder).to_dict(), **changes)


@pytest.mark.parametrize("chat", [True, False])
def test_the_merged_snippet_runs(tmp_path: Path, chat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_base(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    save_tokenizer(folder, chat)
    assert (folder / "chat_template.jinja").is_file() == chat
    (code,) = snippets(model_card(published(folder)))
    exec(compile(code, "snippet", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_other_merged_snippets_run(tmp_path: Path) -> None:
    """In this process: each needs a model of a few thousand numbers."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    t5 = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1)
    made = [
        BertForSequenceClassification(BertConfig(**sizes)),
        BertForTokenClassification(BertConfig(**sizes)),
        T5ForConditionalGeneration(t5),
    ]
    for number, model in enumerate(made):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        (code,) = snippets(model_card(published(folder)))
        exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=4"), "snippet", "exec"), {})


def test_the_peft_snippet_runs(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    save_tokenizer(base)
    make_adapter(tmp_path / "adapter", base, task_type="CAUSAL_LM")
    (code,) = snippets(model_card(replace(local("miss"), repo_id=str(tmp_path / "adapter"))))
    exec(compile(code.replace('"the base model"', repr(str(base))), "snippet", "exec"), {})
