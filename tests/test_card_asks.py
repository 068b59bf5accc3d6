"""What the snippets of a card ask fits the model, and runs: each on a tiny model of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from card_tools import facts, snippets
from conftest import edit_json
from loopback import LoopbackHub
from push_tools import card_of, made
from test_card_snippets import save_tokenizer
from transformers import BertConfig, PreTrainedModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, WhisperConfig

from fossil_export import push
from fossil_export.cards import Facts, model_card

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {**SIZES, "image_size": 32, "patch_size": 8}
SOUND = {**SIZES, "vocab_size": 4, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def bert(head: str, **changes: Any) -> PreTrainedModel:
    kind = getattr(transformers, f"Bert{head}")
    return kind(BertConfig(**SIZES, vocab_size=9, **changes))


def wav2vec(head: str) -> PreTrainedModel:
    return getattr(transformers, f"Wav2Vec2{head}")(Wav2Vec2Config(**SOUND, classifier_proj_size=8))


def vit(head: str) -> PreTrainedModel:
    return getattr(transformers, f"ViT{head}")(transformers.ViTConfig(**VIT))


def whisper(head: str) -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        **layers, vocab_size=9, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=4,
        pad_token_id=1, bos_token_id=4, eos_token_id=1, max_target_positions=20,
    )  # fmt: skip
    return getattr(transformers, f"Whisper{head}")(config)


def ears(folder: Path) -> None:
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def letters(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), unk_token="[UNK]", pad_token="[PAD]")
    transformers.Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)


def listener(folder: Path) -> None:
    (folder / "words.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2}))
    (folder / "merges").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(str(folder / "words.json"), str(folder / "merges"))
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def eyes(folder: Path) -> None:
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


CASES: list[tuple[Callable[..., PreTrainedModel], str, dict[str, Any], Callable[[Path], None], str | None, str]] = [
    (bert, "ForSequenceClassification", {"num_labels": 1}, save_tokenizer, "text-ranking", r"\[-?[\d.e-]+\]"),
    (bert, "ForSequenceClassification", {}, save_tokenizer, "zero-shot-classification", r"\['LABEL_[01]'\]"),
    (
        bert,
        "ForSequenceClassification",
        {"problem_type": "multi_label_classification"},
        save_tokenizer,
        None,
        r"^\[.*\]\n",
    ),
    (bert, "ForTokenClassification", {}, save_tokenizer, None, r"\[('LABEL_[01]',? ?)+\]"),
    (bert, "ForQuestionAnswering", {}, save_tokenizer, None, "\n"),
    (bert, "Model", {}, save_tokenizer, "feature-extraction", r"torch.Size\(\[1, \d+, 16\]\)"),
    (wav2vec, "ForCTC", {}, letters, None, "\n"),
    (wav2vec, "ForSequenceClassification", {}, ears, None, r"\['LABEL_[01]'\]"),
    (wav2vec, "Model", {}, ears, None, r"torch.Size\(\[1, \d+, 16\]\)"),
    (whisper, "ForConditionalGeneration", {}, listener, None, "\n"),
    (vit, "ForImageClassification", {}, eyes, None, r"\['LABEL_[01]'\]"),
    (vit, "Model", {}, eyes, None, r"torch.Size\(\[1, 17, 16\]\)"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}{case[1]}-{case[4]}")
def test_a_snippet_runs_on_a_model_of_its_task(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, head, changes, read, tag, expected = case
    if build is vit:
        image = pytest.importorskip("PIL.Image")
        image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(  # reading a file needs a package more
        "transformers.audio_utils.load_audio", lambda path, rate: np.linspace(-1, 1, rate, dtype=np.float32)
    )
    folder = tmp_path / "model"
    build(head, **changes).save_pretrained(folder)
    read(folder)
    config = json.loads((folder / "config.json").read_text())
    names = tuple(path.name for path in folder.iterdir())
    card = {"pipeline_tag": tag} if tag else None
    (code,) = snippets(model_card(facts(repo_id=str(folder), files=names, config=config, base_card=card)))
    capsys.readouterr()
    exec(compile(code, "snippet", "exec"), {})
    assert re.search(expected, capsys.readouterr().out)


def code_of(found: Facts) -> str:
    (code,) = snippets(model_card(found))
    return code


def test_a_chat_model_is_sent_a_message_and_a_base_model_something_to_go_on_with() -> None:
    old = facts(files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    for found in (facts(), replace(old, chats=True)):
        assert "apply_chat_template" in code_of(found) and "else:" not in code_of(found)
        assert '"content": "What is the capital of France?"' in code_of(found)
    base = code_of(replace(old, chats=False))
    assert "apply_chat_template" not in base and 'tokenizer("The capital of France is", return' in base
    assert "if tokenizer.chat_template:" in code_of(old)  # nobody looked
    onnx = ("model.onnx", "genai_config.json", "tokenizer.json")
    assert 'prompt = "The capital of France is"' in code_of(facts("onnx", files=onnx))
    assert '"content": "What is' in code_of(facts("onnx", files=(*onnx, "chat_template.jinja")))


def test_a_model_that_sees_is_asked_what_it_sees() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    chat = code_of(facts(config=config))
    assert '"What is in this picture?"' in chat and "PIL" not in chat and "France" not in chat
    plain = code_of(facts(config=config, files=("model.safetensors",), chats=False))
    assert 'images=Image.open("photo.jpg"), text="What is in this picture?"' in plain and "from PIL import" in plain


def test_sentence_transformers_open_their_own() -> None:
    files = ("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "tokenizer.json")
    card = model_card(facts(files=files, config={"architectures": ["BertModel"]}, base_card=None))
    assert "library_name: sentence-transformers\n" in card and "SentenceTransformer(" in card
    assert "AutoModel" not in card


def test_of_an_unknown_task_the_model_is_opened_and_nothing_is_asked() -> None:
    card = {"pipeline_tag": "time-series-forecasting"}
    code = code_of(facts(config={"architectures": ["PatchTSTForPrediction"]}, base_card=card))
    assert "France" not in code and "Tokenizer" not in code and code.endswith("\n\nprint(model)")


def test_a_push_reads_the_chat_template_of_an_older_tokenizer(
    hosted: LoopbackHub, models: Path, tmp_path: Path
) -> None:
    folder = made("merged", hosted, models, tmp_path / "artifact")
    for template in folder.glob("chat_template.*"):
        template.unlink()
    for given, asked in (("{{ messages }}", "What is the capital of France?"), (None, "The capital of France is")):
        edit_json(folder / "tokenizer_config.json", chat_template=given)
        push(folder, "ada/new")
        (code,) = snippets(card_of(hosted, tmp_path)[1])
        assert f'"{asked}"' in code and "if tokenizer.chat_template" not in code
