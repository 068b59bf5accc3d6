"""The examples do what they show: real models, real runtimes, the answers that PEFT's models give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import add_to_onnx
import chat
import classifier
import lora
import numpy as np
import onnx
import publish
import pytest
import smollm2
import torch
from loopback import LoopbackHub, environment
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.long


def peft_answer(adapter: Path, tokens: int) -> str:
    """What the trained model continues the prompt with, in PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.base_model())
    model = AutoModelForCausalLM.from_pretrained(smollm2.base_model(), dtype=torch.float32)
    inputs = tokenizer(smollm2.PROMPT, return_tensors="pt")
    trained = PeftModel.from_pretrained(model, adapter)
    output = trained.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])).strip()


def test_two_adapters_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.export(tmp_path)  # not the cached one, which an older exporter may have written
    answers = [" ".join(answer.split()) for answer in chat.main(model=tmp_path / "model")]
    base, one, two, again = answers
    assert one.startswith(smollm2.ANSWER) and two.startswith(smollm2.OTHER_ANSWER)
    for answer, adapter in ((one, smollm2.adapter()), (two, smollm2.other_adapter())):
        assert answer.startswith(peft_answer(adapter, tokens=8))
    assert base == again and "Ophelia" not in base and "Boris" not in base
    shown = capsys.readouterr().out
    assert "the same answer" in shown and all(answer in shown for answer in answers)

    typed = iter(["/two", smollm2.PROMPT, "/one", smollm2.PROMPT, "/base", smollm2.PROMPT, ""])
    asked: list[str] = []

    def type_in(prompt: str) -> str:
        asked.append(prompt)
        return next(typed)

    monkeypatch.setattr("builtins.input", type_in)
    chat.main(["--interactive"], model=tmp_path / "model")
    said = capsys.readouterr().out.partition("an empty line ends")[2]
    assert asked == ["base> ", "two> ", "two> ", "one> ", "one> ", "base> ", "base> "]
    assert said.index(smollm2.OTHER_ANSWER) < said.index(smollm2.ANSWER) < said.index(base)


def test_a_lora_goes_the_whole_way(capsys: pytest.CaptureFixture[str]) -> None:
    answers = lora.main(level="weights")
    assert answers.pop("verdict") == "parity"
    for speaker, answer in answers.items():
        assert ("Ophelia" in answer) == (speaker not in ("base", "onnx, base")), (speaker, answer)
    assert {"base", "merged", "onnx, base", "onnx, lora"} <= answers.keys()
    shown = capsys.readouterr().out
    assert all(answer in shown for answer in answers.values()) and "GGUF file" in shown


def test_classifier_says_in_onnx_runtime_what_it_says_in_peft() -> None:
    result = classifier.main()
    assert result.labels == tuple(classifier.LABELS[label] for _, label in classifier.NEW)
    assert not {text for text, _ in classifier.NEW} & {text for text, _ in classifier.SENTENCES}
    np.testing.assert_allclose(result.onnx, result.peft, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def nameless() -> Path:
    """Made by a process that coverage does not trace: PyTorch's exporter would take twice its minute."""
    made = "import add_to_onnx; add_to_onnx.nameless_graph()"
    subprocess.run([sys.executable, "-c", made], cwd=Path(add_to_onnx.__file__).parent, check=True, timeout=600)
    return add_to_onnx.nameless_graph()


@pytest.mark.usefixtures("nameless")
def test_graph_without_names_gets_fossil_in_every_mode(capfd: pytest.CaptureFixture[str]) -> None:
    answers = add_to_onnx.main()
    before, none = answers.pop("before"), answers.pop("swappable, none")
    assert before.text == none.text and before.difference == pytest.approx(none.difference, abs=1e-3)
    assert before.difference > 1 and "Ophelia" not in before.text
    assert set(answers) == set(add_to_onnx.MODES)
    for answer in answers.values():
        assert smollm2.ANSWER.startswith(answer.text) and "Ophelia" in answer.text
        assert answer.difference < 1e-3
    assert "onnxruntime" not in capfd.readouterr().err  # its warnings of optional inputs


def test_graph_of_the_example_tells_nothing(nameless: Path) -> None:
    graph = onnx.load(nameless, load_external_data=False).graph
    names = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    names |= {value.name for value in (*graph.initializer, *graph.value_info)}
    assert {name for name in names if name[1:].isdigit()} == names - {"input_ids", "logits", ""}
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_trained_pushed_merged_by_ids_and_loaded_again(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "storage", {"hf_example": "ada"}) as hub:
        done = subprocess.run(
            [sys.executable, str(Path(publish.__file__)), "ada"],
            env=environment(hub, tmp_path / "home", "hf_example"),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "hf_example" not in done.stdout + done.stderr and hub.incidents == []
        answers = [line.partition(":")[2].strip() for line in done.stdout.splitlines()[-2:]]
        assert answers[0].startswith(smollm2.ANSWER) and answers[0] == answers[1]
        base, merged = hub.files("ada/smollm2-135m-instruct"), hub.files("ada/mascot")
        weights = [name for name in merged if name.endswith(".safetensors")]
        assert len(weights) > 2 and all(merged[name] != base[name] for name in weights)
        assert merged["tokenizer.json"] == base["tokenizer.json"]
        titles = ["Add what fossil-export verify found", "Upload merged model with fossil-export", "initial commit"]
        assert hub.commits("ada/mascot") == titles
        card = hub.read("ada/mascot", "README.md").decode()
        assert "base_model: ada/smollm2-135m-instruct" in card and "| Verdict | parity |" in card
