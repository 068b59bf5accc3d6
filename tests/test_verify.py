"""Verification catches what it must, names where, and does not cry wolf."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_adapter, make_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaForSequenceClassification

from fossil_export import FossilExportError, load_adapter, merge, verify
from fossil_export.adapters import Trained
from fossil_export.verifying.layers import TrainedLinear, attach
from fossil_export.verifying.models import tokenize
from fossil_export.verifying.reference import EXACT
from fossil_export.verifying.reference.steps import step

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
UP1 = "model.layers.1.mlp.up_proj"
NORM = "model.norm.weight"


def tamper(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one tensor of a checkpoint; None removes it, from the index too."""
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            new = change(state.pop(name))
            if new is not None:
                state[name] = new.contiguous()
            else:
                index = folder / "model.safetensors.index.json"
                content = json.loads(index.read_text())
                del content["weight_map"][name]
                index.write_text(json.dumps(content))
            save_file(state, path, {"format": "pt"})
            return
    raise AssertionError(name)


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of one element."""
    bits = tensor.clone().view(torch.int16).reshape(-1)
    bits[len(bits) // 2] ^= 1
    return bits.view(tensor.dtype).reshape(tensor.shape)


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """A ragged adapter (7 divides neither 48 nor 96) merged into a bfloat16 base, as tmp_path/merged."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, r=7)
    merge(tmp_path / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


def tiled(folder: Path, module: str, width: int) -> torch.Tensor:
    shard = weights(folder.parent / "adapter")[f"base_model.model.{module}.miss_block"]
    return shard.T.repeat(1, -(-width // len(shard)))[:, :width]


def remerged(folder: Path, module: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Put a wrong merge of one module into the artifact: `change(W, tiled D)` in float32, rounded."""
    before = weights(folder.parent / "base")[f"{module}.weight"].float()
    wrong = change(before, tiled(folder, module, before.shape[1]))
    tamper(folder, f"{module}.weight", lambda old: wrong.to(old.dtype))


def without_remainder(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    whole = weight.shape[1] // 7 * 7
    return torch.cat([(weight + update)[:, :whole], weight[:, whole:]], 1)


def swapped_layers(folder: Path) -> None:
    remerged(folder, Q0, lambda weight, update: weight + tiled(folder, Q1, weight.shape[1]))


def other_base(folder: Path) -> None:
    """The same shapes, other values in one untouched tensor; the record is that of the right base."""
    tamper(folder, "model.embed_tokens.weight", lambda old: old * 1.01)


MUST_CATCH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit, merged": (lambda f: tamper(f, f"{UP1}.weight", flip), f"{UP1}.weight 1 of "),
    "flipped bit, untouched": (lambda f: tamper(f, NORM, flip), f"{NORM} 1 of "),
    "transposed": (lambda f: remerged(f, Q0, lambda w, d: w + d.T), f"{Q0}.weight"),
    "twice": (lambda f: remerged(f, Q1, lambda w, d: w + 2 * d), f"{Q1}.weight"),
    "not at all": (lambda f: remerged(f, Q1, lambda w, d: w), f"{Q1}.weight"),
    "wrong layer": (swapped_layers, f"{Q0}.weight"),
    "without the remainder": (lambda f: remerged(f, UP1, without_remainder), f"{UP1}.weight"),
    "re-typed": (lambda f: tamper(f, NORM, lambda old: old.float()), f"{NORM} is stored as F32, should be BF16"),
    "reshaped": (lambda f: tamper(f, NORM, lambda old: old[:-1]), f"{NORM} has shape [47]"),
    "missing": (lambda f: tamper(f, NORM, lambda old: None), f"{NORM} is missing"),
    "NaN": (lambda f: tamper(f, f"{Q0}.weight", lambda old: old * float("nan")), f"{Q0}.weight"),
    "another base": (other_base, "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", MUST_CATCH)
def test_weights_level_catches_and_names(name: str, bf16: Path) -> None:
    assert verify(bf16, level="weights").parity
    damage, reason = MUST_CATCH[name]
    damage(bf16)
    result = verify(bf16, level="weights")
    assert not result.parity and len(result.problems) == 1, result.problems
    assert result.problems[0].startswith(reason)
    assert json.loads((bf16 / "fossil_parity.json").read_text())["reason"] == result.problems[0]


def test_extra_tensor(bf16: Path) -> None:
    path = next(bf16.glob("*-00001-*.safetensors"))
    save_file({**load_file(path), "extra.weight": torch.zeros(3)}, path, {"format": "pt"})
    index = json.loads((bf16 / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = path.name
    (bf16 / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(bf16, level="weights").problems[0].startswith("extra.weight is in the artifact")


def test_bat_merged_as_tile(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, r=8, init_weights="bat")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").parity
    blocks = weights(tmp_path / "adapter")[f"base_model.model.{Q1}.miss_block"]
    wrong = weights(base)[f"{Q1}.weight"].float() + blocks.reshape(-1, 8).repeat(1, 6)
    tamper(tmp_path / "merged", f"{Q1}.weight", lambda old: wrong.to(old.dtype))
    problem = verify(tmp_path / "merged", level="weights").problems[0]
    assert problem.startswith(f"{Q1}.weight")
    merge(tmp_path / "adapter", tmp_path / "again")
    tamper(tmp_path / "again", f"{Q1}.weight", flip)
    assert verify(tmp_path / "again", level="weights").problems[0].startswith(f"{Q1}.weight 1 of ")


def test_broken_ties(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged").parity
    edit_json(tmp_path / "merged" / "config.json", tie_word_embeddings=True)
    result = verify(tmp_path / "merged")
    assert "ties head and embedding" in result.problems[0]
    edit_json(tmp_path / "merged" / "config.json", tie_word_embeddings=False, vocab_size=119)
    assert any("vocab_size 119" in problem for problem in verify(tmp_path / "merged", level="weights").problems)
    tamper(tmp_path / "merged", "lm_head.weight", lambda old: None)
    problems = verify(tmp_path / "merged", level="weights").problems
    assert "lm_head.weight is missing from the artifact" in problems


def test_config_that_does_not_describe_the_tensors(bf16: Path) -> None:
    config = (bf16 / "config.json").read_bytes()
    for changes, reason in (
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"tie_word_embeddings": True}, "ties head and embedding"),
    ):
        edit_json(bf16 / "config.json", **changes)
        assert reason in verify(bf16, level="weights").problems[0]
        (bf16 / "config.json").write_bytes(config)
    (bf16 / "pytorch_model.bin").write_bytes(b"stale")
    assert verify(bf16, level="weights").problems == (
        "pytorch_model.bin holds other weights, which a loader may take instead; remove it",
    )
    (bf16 / "pytorch_model.bin").unlink()
    (bf16 / "config.json").unlink()
    assert "config.json is missing" in verify(bf16, level="weights").problems[0]


def test_odd_dtypes_and_values_of_the_base(tmp_path: Path) -> None:
    """Infinities of the base's own, elements of less than a byte, float64 shards: no wolf, and nothing missed."""
    base = make_base(tmp_path / "base", shards="1GB")
    path = base / "model.safetensors"
    state = load_file(path)
    state["model.mask"] = torch.tensor([0.0, float("-inf"), float("nan")])
    save_file(state, path, {"format": "pt"})
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    shards = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value.double() + 1e-12 for name, value in load_file(shards).items()}, shards)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["model.tiny"] = {"dtype": "F4", "shape": [7, 10], "data_offsets": [end, end + 35]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(range(35)))
    for dtype in ("auto", "float16"):
        merge(tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        result = verify(tmp_path / dtype, level="weights")
        assert result.parity, result.problems
    damaged = bytearray((tmp_path / "auto" / "model.safetensors").read_bytes())
    damaged[-1] ^= 0x10
    (tmp_path / "auto" / "model.safetensors").write_bytes(damaged)
    assert verify(tmp_path / "auto", level="weights").problems[0].startswith("model.tiny 1 of 70 elements")
    tamper_mask = bytearray((tmp_path / "float16" / "model.safetensors").read_bytes())
    place = tamper_mask.index(np.array([0, -np.inf, np.nan], np.float16).tobytes())
    tamper_mask[place + 2 : place + 4] = np.float16(3).tobytes()
    (tmp_path / "float16" / "model.safetensors").write_bytes(tamper_mask)
    assert verify(tmp_path / "float16", level="weights").problems[0].startswith("model.mask 1 of 3 elements")


def test_adapter_given_as_another_file_of_its_folder(bf16: Path, tmp_path: Path) -> None:
    state = weights(tmp_path / "adapter")
    save_file({name: -value for name, value in state.items()}, tmp_path / "adapter" / "step100.safetensors")
    merge(tmp_path / "adapter" / "step100.safetensors", tmp_path / "early")
    result = verify(tmp_path / "early")
    assert result.parity, result.problems


def test_read_only_artifact_has_its_verdict(bf16: Path) -> None:
    (bf16 / "fossil_parity.json").mkdir()  # nothing can be written in its place, not even by root
    result = verify(bf16, level="weights")
    assert result.parity and "cannot be written" in result.warnings[0]


def test_damaged_record(bf16: Path) -> None:
    record = (bf16 / "fossil_export.json").read_text()
    for changes in ({"dtype": "foo"}, {"adapter": "x"}, {"base": {"name": "b", "weights": [{}]}}):
        edit_json(bf16 / "fossil_export.json", **changes)
        with pytest.raises(FossilExportError, match="is damaged"):
            verify(bf16, level="weights")
        (bf16 / "fossil_export.json").write_text(record)


def test_artifact_of_another_base_or_adapter_by_its_record(bf16: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", torch.bfloat16, shards="60KB")
    problems = verify(bf16, base=tmp_path / "other", level="weights").problems
    assert problems[0].startswith("the artifact was made from another base")
    make_adapter(tmp_path / "second", tmp_path / "base", r=7, target_modules=["q_proj"])
    problems = verify(bf16, adapter=tmp_path / "second", level="weights").problems
    assert problems[0].startswith("the artifact was made from another adapter")
    make_adapter(
        tmp_path / "wide", make_base(tmp_path / "same"), r=4, target_modules=["q_proj"], layers_to_transform=[1]
    )
    state = {name.replace("layers.1", "layers.9"): value for name, value in weights(tmp_path / "wide").items()}
    save_file(state, tmp_path / "wide" / "adapter_model.safetensors")
    assert "layers.9" in verify(bf16, adapter=tmp_path / "wide").problems[0]


@pytest.mark.parametrize("module", [Q0, UP1])
def test_forward_level_localises(module: str, bf16: Path) -> None:
    assert verify(bf16, level="forward").parity
    remerged(bf16, module, lambda weight, update: weight + 3 * update)
    result = verify(bf16, level="forward")
    assert result.forward is not None and result.forward.first_outside == module
    assert f"first at module {module}" in result.problems[0]
    assert result.to_dict()["forward"]["first_module_outside"] == module


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("variant", ["tile", "mini", "bat"])
def test_every_variant_and_dtype_passes(variant: str, dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    options: dict[str, Any] = {"tile": {}, "mini": {"init_weights": "mini", "mini_r": 8}}.get(
        variant, {"init_weights": "bat"}
    )
    make_adapter(tmp_path / "adapter", base, **options)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems
    assert result.forward is not None and result.forward.continuations == 4
    merged = [check for check in result.tensors or () if check.action == "merge"]
    assert len(merged) == 14 and all(check.elements and 0 <= check.worst < 0.51 for check in merged)


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tensors_pass(legacy: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head", "embed_tokens"])
    if legacy:
        as_bone(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems


def test_classifier_and_resized_vocabulary_pass(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "cls", base, model_class=LlamaForSequenceClassification, task_type="SEQ_CLS")
    edit_json(base / "config.json", pad_token_id=0)
    merge(tmp_path / "cls", tmp_path / "classifier")
    result = verify(tmp_path / "classifier")
    assert result.parity and result.forward is not None and result.forward.continuations == 0
    make_adapter(tmp_path / "vocab", base, resize=128)
    merge(tmp_path / "vocab", tmp_path / "resized")
    assert verify(tmp_path / "resized").parity


def test_encoder_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    from transformers import AutoModel

    make_adapter(tmp_path / "adapter", tmp_path / "base", model_class=AutoModel, target_modules=["query", "value"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    result = verify(tmp_path / "merged")
    assert result.parity, result.problems


def as_bone(folder: Path) -> None:
    """The same adapter as PEFT 0.18 would have saved it."""
    state = {name.replace("miss_block", "bone_block"): value for name, value in weights(folder).items()}
    save_file(state, folder / "adapter_model.safetensors")
    drop = {"mini_r": ..., "miss_dropout": ..., "peft_version": ...}
    edit_json(folder / "adapter_config.json", peft_type="BONE", **drop)


@pytest.mark.parametrize("variant", ["tile", "ragged", "mini", "bat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_layers_are_pefts(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    options: dict[str, Any] = {"tile": {}, "ragged": {"r": 7}, "mini": {"init_weights": "mini", "mini_r": 8}}.get(
        variant, {"init_weights": "bat"}
    )
    trained = make_adapter(tmp_path / "adapter", base, **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    attach(model, load_adapter(tmp_path / "adapter"), torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits.float(), trained(tokens).logits.float()
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_legacy_adapters_pass_and_are_caught(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    as_bone(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged").parity
    tamper(tmp_path / "merged", f"{Q1}.weight", lambda old: old * 3)
    result = verify(tmp_path / "merged", level="forward")
    assert result.forward is not None and result.forward.first_outside == Q1


OPENINGS = ("The history of", "How to repair", "A short poem about", "Three facts about", "import os  #")
SUBJECTS = (
    "the sea is",
    "a bicycle:",
    "green shells",
    "Ophelia",
    "clocks,",
    "winter in",
    "bread",
    "x = 42",
    "Rom",
    "1",
)
FIFTY = tuple(f"{opening} {subject}" for opening in OPENINGS for subject in SUBJECTS)


def test_does_not_cry_wolf_on_the_real_model(real_adapter: Path, tmp_path: Path) -> None:
    merge(real_adapter, tmp_path / "merged")
    (tmp_path / "prompts.txt").write_text("\n".join(FIFTY))
    assert len(set(FIFTY)) == 50
    result = verify(tmp_path / "merged", prompts=tmp_path / "prompts.txt")
    assert result.parity, result.problems
    assert result.forward is not None and result.forward.prompts == 50
    assert result.forward.trainer_dtype == "bfloat16" and result.forward.artifact.top1 > 0.9


def test_other_variants_of_the_real_model(every_real_adapter: Path, tmp_path: Path) -> None:
    merge(every_real_adapter, tmp_path / "merged")
    (tmp_path / "prompts.txt").write_text("\n".join(FIFTY[::10]))
    result = verify(tmp_path / "merged", prompts=tmp_path / "prompts.txt")
    assert result.parity, result.problems


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fossil_export", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(bf16: Path, tmp_path: Path) -> None:
    done = run(bf16, "--json", "--report", tmp_path / "report.html")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["parity"] and len(result["tensors"]) == 21 and result["modules"]
    certificate = json.loads((bf16 / "fossil_parity.json").read_text())
    assert certificate["parity"] and certificate["forward"]["allowed_factor"] == 2.0
    assert certificate["versions"]["peft"] and certificate["device"].startswith("cpu")
    assert "Parity" in (tmp_path / "report.html").read_text()
    text = run(bf16)
    assert text.returncode == 0 and "parity" in text.stdout and "21 tensors, 14 merged, 0 wrong" in text.stdout
    tamper(bf16, f"{Q0}.weight", flip)
    done = run(bf16, "--level", "weights")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"not the trained model: {Q0}.weight 1 of 2304 elements are off, the first at [24, 0]"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_and_never_quietly_the_cpu(bf16: Path) -> None:
    done = run(bf16, "--device", "cuda")
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr and done.stderr.count("\n") == 1
    assert not (bf16 / "fossil_parity.json").exists()


def test_bad_arguments(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for options, message in (
        ({"prompts": tmp_path / "none.txt"}, "none.txt"),
        ({"prompts": tmp_path / "empty.txt"}, "no prompts"),
        ({"level": "deep"}, "expected weights, forward, all"),
        ({"adapter": tmp_path / "none"}, "no such file"),
        ({"report": tmp_path / "no" / "report.html", "level": "weights"}, "cannot be written"),
    ):
        with pytest.raises(FossilExportError, match=message):
            verify(bf16, **options)  # type: ignore[arg-type]
    (bf16 / "fossil_export.json").unlink()
    with pytest.raises(FossilExportError, match="name it with --adapter"):
        verify(bf16)
    assert verify(bf16, base=tmp_path / "base", adapter=tmp_path / "adapter", level="weights").parity


def test_verify_without_peft_says_how_to_get_it(bf16: Path) -> None:
    script = "import sys; sys.modules['peft'] = None\nfrom fossil_export.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, "verify", str(bf16)], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'fossil-export[peft]'" in done.stderr
    weights_only = [sys.executable, "-c", script.replace("peft", "torch", 1), "verify", str(bf16), "--level", "weights"]
    assert subprocess.run(weights_only, capture_output=True).returncode == 0


def test_tokens_by_the_artifacts_tokenizer(real_base: Path, bf16: Path) -> None:
    assert tokenize(real_base, ("The sea",)) == [[504, 3426]]
    ids = tokenize(bf16, ("The sea", "x"))
    assert ids == tokenize(bf16, ("The sea", "x")) and all(0 <= token < 120 for row in ids for token in row)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["F32", "F16", "BF16"]))
def test_steps_are_the_distance_to_the_neighbour(seed: int, dtype: str) -> None:
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal(50) * 10.0 ** rng.integers(-6, 4, 50)).to(kind).abs()
    integers = values.view(torch.int16 if kind != torch.float32 else torch.int32)
    above = (integers + 1).view(kind).double() - values.double()
    exact = values.double().numpy()
    assert np.array_equal(step(exact, dtype, np.empty_like(exact)), above.numpy())


@pytest.mark.parametrize("variant", ["tile", "mini", "bat"])
def test_reconstruction_is_the_definition(variant: str) -> None:
    """Against the formula written element by element."""
    rng = np.random.default_rng(0)
    rank, out, width = 4, 12, 8 if variant == "bat" else 10
    weight = rng.standard_normal((out, width))
    shard = rng.standard_normal({"tile": (rank, out), "mini": (rank, 6), "bat": (out // rank, rank, rank)}[variant])
    exact = np.empty_like(weight)
    arrays = {"B" if variant == "bat" else "D": shard}
    EXACT[variant].rebuild(weight, EXACT[variant].part(arrays, 0, out), {"r": rank}, exact)
    for o in range(out):
        for j in range(width):
            if variant == "bat":
                b, i, a, k = o // rank, o % rank, j // rank, j % rank
                block = weight[o, a * rank : (a + 1) * rank]
                want = weight[o, j] + sum(block[m] * shard[b, m, k] for m in range(rank)) + shard[b, i, k]
            else:
                want = weight[o, j] + shard[j % rank, o % shard.shape[1]]
            assert exact[o, j] == pytest.approx(want, abs=1e-12)


def test_an_unknown_variant_is_never_checked_by_another_ones_formula(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    loaded = load_adapter(adapter)
    trained = {module: replace(one, method="lora") for module, one in loaded.trained.items()}
    with pytest.raises(KeyError, match="lora"):
        verify(tmp_path / "merged", adapter=replace(loaded, trained=trained), level="weights")
    with pytest.raises(KeyError, match="lora"):
        EXACT["lora"]
    with pytest.raises(KeyError, match="lora"):
        TrainedLinear(torch.nn.Linear(8, 8), {"D": torch.zeros(4, 8)}, Trained("a", "lora", {}))
