"""Forty classes of the sweep over transformers, and the judge itself: what is wrong in silence is found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json
from safetensors.torch import load_file, save_file
from sweep import cases, pool
from sweep.__main__ import sweep
from sweep.catalogue import Entry, entries, sample
from sweep.journal import Journal
from sweep.table import summary, support

from fossil_export import merge

pytestmark = pytest.mark.long

KNOWN = {entry.name: entry for entry in entries()}
CLASSES = [
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "FalconForTokenClassification",
    "BloomForCausalLM",
    "Gemma2ForSequenceClassification",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "MambaForCausalLM",
    "JambaForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "ElectraForMaskedLM",
    "ModernBertForMaskedLM",
    "LukeForMaskedLM",
    "XLNetForQuestionAnsweringSimple",
    "DistilBertForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "BioGptForCausalLM",
    "EncoderDecoderModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MBartForSequenceClassification",
    "BlenderbotForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "ASTForAudioClassification",
    "HubertForSequenceClassification",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "CLIPModel",
    "PI0ForConditionalGeneration",
    "ViTForImageClassification",
    "DINOv3ViTModel",
    "SwinForImageClassification",
    "SegformerForSemanticSegmentation",
    "MobileViTForSemanticSegmentation",
    "PatchTSTForRegression",
]
LLAMA = KNOWN["LlamaForCausalLM"]


def rows(entry: Entry, folder: Path, *kinds: str) -> dict[str, cases.Row]:
    found = cases.run_class(entry, folder, kinds or cases.ALL_KINDS, ())
    return {row.kind: row for row in found if isinstance(row, cases.Row)}


@pytest.mark.parametrize("name", CLASSES)
def test_no_merge_is_wrong_in_silence(name: str, tmp_path: Path) -> None:
    found = rows(KNOWN[name], tmp_path)
    assert found[cases.ALL_DONE].result == cases.BUILT and len(found) > 1
    wrong = [
        f"{row.kind}: {row.result} {row.why}" for row in found.values() if row.result in (cases.WRONG, cases.CRASH)
    ]
    assert wrong == []


def spoiled(how: Any) -> Any:
    """A merge whose result is changed afterwards."""

    def run(adapter: Path, output: Path, *, base: Path) -> None:
        merge(adapter, output, base=base)
        how(output)

    return run


def change_values(folder: Path, name: str, by: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 2] += by
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SPOILED: dict[str, Callable[[Path], Any]] = {
    "layers.1.self_attn.q_proj.weight is off": lambda it: change_values(
        it, "model.layers.1.self_attn.q_proj.weight", 1e-4
    ),
    "embed_tokens.weight was not trained and is changed": lambda it: change_values(
        it, "model.embed_tokens.weight", 1e-6
    ),
    "the values are right, the answers are off": lambda it: edit_json(it / "config.json", rms_norm_eps=0.5),
    "layers.2.input_layernorm.weight is not in the files": lambda it: edit_json(
        it / "config.json", num_hidden_layers=3
    ),
    "lm_head.weight is not in the files": drop_head,
    "cannot be loaded": lambda it: (it / "config.json").write_text("{"),
}


@pytest.mark.parametrize("why", SPOILED)
def test_what_is_wrong_is_found(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "merge", spoiled(SPOILED[why]))
    row = rows(LLAMA, tmp_path, "narrow")["narrow"]
    assert row.result == cases.WRONG and why in row.why and row.peft == "right"


def test_an_error_that_is_no_refusal_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "merge", lambda *args, **options: {}["nothing"])
    row = rows(LLAMA, tmp_path, "narrow")["narrow"]
    assert row.result == cases.CRASH and row.why == "KeyError: 'nothing'" and row.peft == "right"


def test_a_trainer_that_reads_the_weight_itself_is_told(tmp_path: Path) -> None:
    found = rows(KNOWN["MambaForCausalLM"], tmp_path, "linear", "norm")
    assert found["linear"].result == cases.UNUSED and found["norm"].result == cases.EXACT


class Fatal(str):
    """A name that ends the process which unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_workers_may_die_and_the_journal_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kinds = tmp_path / "journal.jsonl", ("narrow", "norm")
    broken = Entry(Fatal("ForNothing"), "a")
    found = sweep([broken, LLAMA], kinds, 1, Journal(path))
    assert [(row.name, row.result) for row in found] == [
        ("ForNothing", cases.IMPOSSIBLE),
        *((LLAMA.name, result) for result in (cases.EXACT, cases.EXACT, cases.BUILT)),
    ]
    assert found[0].why == "the process ended with 3"
    assert all(row.forward for row in found[1:3])

    def none(tasks: list[pool.Task], *rest: Any) -> None:
        assert tasks == []

    monkeypatch.setattr(pool, "run", none)
    assert sweep([broken, LLAMA], kinds, 1, Journal(path)) == found
    lines = [json.loads(line) | {"version": "another"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Journal(path).rows == {}


def test_the_table_has_every_result() -> None:
    found = [
        cases.Row("AForIt", "a", "narrow", cases.EXACT, peft="right", forward=True),
        cases.Row("BForIt", "a", "narrow", cases.RIGHT, peft="right"),
        cases.Row("AForIt", "a", "norm", cases.EXACT, peft="wrong: all of it"),
        cases.Row("AForIt", "a", "head", cases.WRONG, "lm_head.weight is off", "right"),
        cases.Row("AForIt", "a", cases.ALL_DONE, cases.BUILT),
        cases.Row("BForIt", "a", cases.ALL_DONE, cases.BUILT),
        cases.Row("CForIt", "c", cases.NOT_BUILT, cases.IMPOSSIBLE, "ImportError: timm"),
    ]
    table, said = support(found, list(cases.ALL_KINDS[:9])), summary(found)
    assert "| a |  | 1✓ 1≈ |  | **W** | ✓ |  |  |  |  |" in table.splitlines()
    assert "- AForIt, head: lm_head.weight is off" in table and "- 1 × `ImportError: timm`: c" in table
    assert said.startswith("WRONG AForIt, head: lm_head.weight is off (PEFT right)")
    assert "of 3 that PEFT merges right, 1 are the same to the bit here (33.3 %)" in said
    assert "of 1 that PEFT merges wrong, 1 are right here" in said


def test_the_sample_is_varied() -> None:
    taken = sample(list(entries()), 40)
    assert len({entry.name for entry in taken}) == len({entry.model_type for entry in taken}) == 40
