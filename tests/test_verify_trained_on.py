"""Whether an adapter's merge is the model that was trained, if training quantized the base on loading (QLoRA)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import edit_json
from quantized_bases import adapter_for, fp8_folder, plain_model
from quantized_training import as_loaded, card, settings
from verify_tools import flip, tamper

from fossil_export import convert, merge, verify
from fossil_export.cards._section import _base
from fossil_export.cli import main
from fossil_export.errors import CheckpointError
from fossil_export.verifying._prompts import PROMPTS

UP1 = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell models apart that differ in a module."""
    monkeypatch.setattr("fossil_export.verifying._verification.PROMPTS", PROMPTS[:2])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("base") / "plain")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """An adapter that PEFT says was trained over nf4."""
    adapter_for(plain, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text(card(settings()))
    return tmp_path / "adapter"


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "fossil_parity.json").read_text())
    return found


def test_its_merge_is_the_trained_model_by_weights_and_answers(plain: Path, adapter: Path, tmp_path: Path) -> None:
    """The trainer is the one on what transformers and bitsandbytes load, to the last bit."""
    asked = settings(double_quant=False)
    (adapter / "README.md").write_text(card(asked))
    merge(adapter, tmp_path / "merged")
    found = verify(tmp_path / "merged")
    assert found.parity and found.forward is not None, found.problems
    assert found.compared_with == "the adapter on the base as training saw it (nf4 without double quantization)"
    known = certificate(tmp_path / "merged")
    assert known["base_weights"] == "as trained" and known["trained_on"]["kind"] == "nf4" and "into" not in known
    assert known["quantized_training"] is None
    assert _base(known) == "the base as training saw it (nf4 without double quantization)"
    seen = as_loaded(plain, tmp_path / "seen", asked)
    other = verify(tmp_path / "merged", base=seen, adapter=adapter, level="forward", trained_on="unquantized")
    assert other.forward is not None and other.forward.trainer == found.forward.trainer


def test_its_merge_into_the_original_is_not(adapter: Path, tmp_path: Path) -> None:
    """The tensors are what was asked for, and the model is another one; the verdict has its numbers."""
    merge(adapter, tmp_path / "merged", into="original")
    found = verify(tmp_path / "merged")
    assert found.tensors is not None and not any(check.problem for check in found.tensors)
    assert len(found.problems) == 1 and found.problems[0].startswith(
        "it was merged into the original weights, and training saw them as nf4 with double quantization: the logits of"
    )
    known = certificate(tmp_path / "merged")
    assert not known["parity"] and known["into"] == "original" and known["weights"]["wrong"] == 0
    assert known["forward"]["artifact"]["relative_error"] > 3 * known["forward"]["trainer"]["relative_error"]


def test_weights_alone_do_not_make_the_original_the_trained_model(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged", into="original")
    found = verify(tmp_path / "merged", level="weights")
    assert len(found.problems) == 1 and "not the model that was trained; --level forward says" in found.problems[0]
    tamper(tmp_path / "merged", UP1, flip)
    found = verify(tmp_path / "merged", level="weights")
    assert len(found.problems) == 2 and found.problems[0].startswith(f"{UP1} 1 of")


def test_what_rounding_hides_is_the_trained_model_wherever_it_was_merged(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    """Weights that lie on nf4's values already are hardly changed by quantizing them again."""
    base = as_loaded(plain, tmp_path / "base", settings())
    merge(adapter, tmp_path / "merged", base=base, into="original")
    found = verify(tmp_path / "merged", base=base, level="forward")
    assert found.parity and found.forward is not None
    assert any("no further from the trained model's than rounding" in line for line in found.warnings)


def test_one_bit_of_the_quantized_base_is_seen(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    tamper(tmp_path / "merged", UP1, flip)
    found = verify(tmp_path / "merged", level="weights")
    assert len(found.problems) == 1 and found.problems[0].startswith(f"{UP1} 1 of")


def test_a_merge_of_others_into_the_original_is_seen(plain: Path, adapter: Path, tmp_path: Path) -> None:
    """Without a record the adapter's own files tell what training saw."""
    merge(adapter, tmp_path / "merged", into="original")
    (tmp_path / "merged" / "fossil_export.json").unlink()
    found = verify(tmp_path / "merged", base=plain, adapter=adapter)
    assert not found.parity and found.forward is not None and found.forward.problem is not None
    assert any("what is made of the original weights is far off so" in line for line in found.problems)
    found = verify(tmp_path / "merged", base=plain, adapter=adapter, trained_on="unquantized")
    assert found.parity and found.compared_with == "the adapter on the base as it is stored"


def test_the_user_knows_better(plain: Path, tmp_path: Path) -> None:
    adapter = adapter_for(plain, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").parity
    done = CliRunner().invoke(
        main,
        [
            *("verify", str(tmp_path / "merged"), "--level", "weights"),
            *("--trained-on", "nf4", "--no-bnb-4bit-use-double-quant"),
        ],
    )
    assert done.exit_code == 1 and "elements are off" in done.output
    assert "the base as training saw it (nf4 without double quantization)" in done.output


def test_a_lora_is_run_on_the_base_that_training_saw(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "lora", to="lora")
    found = verify(tmp_path / "lora")
    assert found.parity and found.forward is not None, found.problems
    assert "as training saw it (nf4" in found.compared_with


@pytest.mark.parametrize(
    "changes",
    [
        {"into": "elsewhere"},
        {"trained_on": {}},
        {"trained_on": {"kind": "nf5", "compute_dtype": "bfloat16", "skip_modules": None, "found_in": None}},
        {"trained_on": {"kind": "nf4", "compute_dtype": "int3", "skip_modules": None, "found_in": None}},
        {"trained_on": {"kind": "nf4", "compute_dtype": "bfloat16", "skip_modules": [1], "found_in": None}},
        {"trained_on": {"kind": "nf4", "block_size": 0, "compute_dtype": "F", "skip_modules": None, "found_in": None}},
        {"trained_on": "nf4"},
    ],
)
def test_a_damaged_record_is_told(changes: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    edit_json(tmp_path / "merged" / "fossil_export.json", **changes)
    with pytest.raises(CheckpointError, match=r"fossil_export.json: is damaged"):
        verify(tmp_path / "merged", level="weights")


def test_a_merge_that_was_said_to_be_of_no_quantized_training_is_that(adapter: Path, tmp_path: Path) -> None:
    """The adapter's files say otherwise; the record has what the user said, and the certificate has both."""
    merge(adapter, tmp_path / "merged", trained_on="unquantized")
    found = verify(tmp_path / "merged", level="weights")
    assert found.parity and "as it is stored" in found.compared_with
    known = certificate(tmp_path / "merged")
    assert known["base_weights"] == "as stored" and known["quantized_training"] is not None
    assert not verify(tmp_path / "merged", level="weights", trained_on="nf4").parity


def test_a_merge_into_another_quantized_base_is_not_the_trained_model(adapter: Path, tmp_path: Path) -> None:
    base, _ = fp8_folder(tmp_path / "fp8")
    merge(adapter, tmp_path / "merged", base=base, into="original")
    found = verify(tmp_path / "merged", base=base, level="weights")
    (problem,) = found.problems
    assert "its base is stored as fp8; training saw nf4 with double quantization (its README.md" in problem
    (adapter / "README.md").unlink()
    assert verify(tmp_path / "merged", base=base, level="weights").problems == ()


def test_training_in_another_dtype_than_the_stored_one_is_no_fault_of_the_merge(adapter: Path, tmp_path: Path) -> None:
    (adapter / "README.md").write_text(card(settings(dtype="float16")))
    merge(adapter, tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").problems == ()
    tamper(tmp_path / "merged", UP1, flip)
    assert len(verify(tmp_path / "merged", level="weights").problems) == 1
