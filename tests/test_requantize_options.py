"""Merges that keep the base's quantization, in pieces, files, parts and of several adapters; and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_bases
import pytest
import requantize_tools
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from quantized_mxfp4 import trained
from requantize_tools import WEIGHTS, merge, verified
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fossil_export
from fossil_export import Progress
from fossil_export.cli import main
from fossil_export.errors import MergeError
from fossil_export.merging import _requantize

made = requantize_tools.made


def test_the_device_and_pieces_do_not_show(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mxfp4", "fp8", "nested nf4"):
        case, merged = made(name)
        wanted = (merged / WEIGHTS).read_bytes()
        record = (merged / "fossil_export.json").read_bytes()
        merge(case, tmp_path / name / "torch", device="cpu:0")
        assert (tmp_path / name / "torch" / WEIGHTS).read_bytes() == wanted
        with monkeypatch.context() as patch:
            patch.setattr(_requantize, "AT_ONCE", 1)
            merge(case, tmp_path / name / "cut")
            assert (tmp_path / name / "cut" / WEIGHTS).read_bytes() == wanted
            assert verified(case, tmp_path / name / "cut").parity
        assert (tmp_path / name / "torch" / "fossil_export.json").read_bytes() == record


def test_experts_are_quantized_one_by_one(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = made("mxfp4")
    plan = fossil_export.plan_merge(case.adapter, case.quantized, requantize=True)
    experts = [one for one in plan.tensors if one.encodes is not None and one.leads]
    monkeypatch.setattr(_requantize, "AT_ONCE", 1)
    for one in experts:
        assert one.coded is not None and one.coded.shape[0] == 3
        assert len(_requantize.ranges(one.coded, one.weight.parts)) == 3


def test_progress_tells_of_all_bytes(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = made("mxfp4")
    monkeypatch.setattr(_requantize, "AT_ONCE", 1)
    told: list[Progress] = []
    result = merge(case, tmp_path / "out", progress=told.append)
    last = told[-1]
    assert (last.step, last.unit) == ("merging", "B")
    assert last.done == last.total == sum(one.nbytes for one in result.plan.tensors)


def test_several_adapters_and_weights(made: Any, tmp_path: Path) -> None:
    case, _ = made("fp8")
    other = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    second = trained(case.dequantized, tmp_path / "second", other)
    given = [(case.adapter, 0.5), (second, 1.0)]
    fossil_export.merge(given, tmp_path / "out", base=case.quantized, requantize=True)
    found = fossil_export.verify(tmp_path / "out", adapter=given, base=case.quantized, level="weights")
    assert found.parity, found.problems
    half = fossil_export.verify(tmp_path / "out", adapter=[(case.adapter, 0.6), (second, 1.0)], base=case.quantized,
                                level="weights")  # fmt: skip
    assert not half.parity


def test_files_may_be_cut_anew(made: Any, tmp_path: Path) -> None:
    case, merged = made("nested nf4")
    merge(case, tmp_path / "out", max_shard_size=100_000)
    found = {key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    wanted = load_file(merged / WEIGHTS)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 and verified(case, tmp_path / "out").parity


def test_a_weight_in_two_files_is_written_by_two_parts(made: Any, tmp_path: Path) -> None:
    """Each part quantizes it and keeps what its own file has of it."""
    case, _ = made("nested nf4")
    options: dict[str, Any] = {"requantize": True, "min_survival": 0, "max_shard_size": "2KB"}
    plan = fossil_export.plan_merge(case.adapter, case.quantized, **options)
    homes: dict[str, set[str]] = {}
    for file in plan.files:
        for tensor, _ in file.tensors:
            if tensor.encodes is not None:
                homes.setdefault(tensor.encodes.name, set()).add(file.name)
    assert any(len(names) > 1 for names in homes.values())
    for number in (2, 1):
        fossil_export.merge_part(plan, tmp_path / "merged", (number, 2))
    fossil_export.finish_merge(plan, tmp_path / "merged")
    fossil_export.run_merge(plan, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name


def refused(adapter: Path, base: Path, match: str, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(MergeError, match=match):
        fossil_export.merge(adapter, tmp_path / "refused", base=base, requantize=True, **options)
    assert not (tmp_path / "refused").exists()


def test_what_cannot_be_quantized_again_is_refused(made: Any, tmp_path: Path) -> None:
    case, _ = made("nf4")
    refused(case.adapter, case.dequantized, "is not quantized, so nothing can be quantized again", tmp_path)
    refused(case.adapter, case.quantized, "keeps the base's dtypes; leave out --dtype", tmp_path, dtype="float32")
    refused(case.adapter, case.quantized, "min_survival is 2, expected a share", tmp_path, min_survival=2)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(case.dequantized)
    get_peft_model(model, config).save_pretrained(tmp_path / "score")
    refused(tmp_path / "score", case.quantized, "has no score.weight, .*leave out --requantize", tmp_path)


def test_the_command_says_what_it_did(made: Any, tmp_path: Path) -> None:
    case, _ = made("nf4")
    out = tmp_path / "out"
    options = [str(case.adapter), "--base", str(case.quantized), "-o", str(out), "--requantize"]
    planned = CliRunner().invoke(main, ["merge", *options, "--dry-run"])
    assert "(bitsandbytes, kept)" in planned.output and "requantize 56" in planned.output, planned.output
    done = CliRunner().invoke(main, ["merge", *options])
    assert "14 of 21 tensors" in done.output and "(quantized again: bitsandbytes)" in done.output, done.output
    says = CliRunner().invoke(main, ["verify", str(out), "--base", str(case.quantized), "--adapter", str(case.adapter),
                                     "--level", "weights"])  # fmt: skip
    assert says.exit_code == 0 and "its answers were not compared" in says.output, says.output
    assert "14 quantized again (bitsandbytes), 0 wrong" in says.output and "update kept" in says.output
    for wrong, option in (
        ("wants --requantize", ["--min-survival", "0.1"]),
        ("take back", ["--requantize", "--stream"]),
    ):
        without = [one for one in options if one not in ("--requantize", "-o", str(out))]
        found = CliRunner().invoke(main, ["merge", *without, "--push-to-hub", "ada/out", *option])
        assert found.exit_code == 2 and wrong in found.output, found.output


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_gguf_base_is_refused(kind: str, tmp_path: Path) -> None:
    base = gguf_bases.write(tmp_path / "base.gguf", kind=kind)
    model = AutoModelForCausalLM.from_pretrained(gguf_bases.loaded(base, tmp_path / "plain"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    refused(
        tmp_path / "adapter", base, "gguf are read and not written; leave out --requantize|is not quantized", tmp_path
    )
