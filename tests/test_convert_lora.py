"""Conversion to a LoRA that PEFT loads and that is the trained model, or the nearest one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_adapter, make_base, weights
from convert_tools import logits, with_lora
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fossil_export import FossilExportError, convert, merge, verify
from fossil_export.converting._lora import target_modules
from fossil_export.converting._nearest import truncated
from fossil_export.verifying import _forward


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8},
        {"r": 7},
        {"r": 6, "init_weights": "mini", "mini_r": 8},
        {"r": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "layers_to_transform": [1]},
        {"r": 8, "target_modules": r"model\.layers\.0\..*(gate|v)_proj"},
        {"r": 8, "target_modules": "all-linear"},
    ],
)
def test_lora_is_the_trained_model(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", base, **config)
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    torch.testing.assert_close(logits(with_lora(base, made.output)), logits(trained), rtol=1e-4, atol=1e-5)
    stored = json.loads((made.output / "adapter_config.json").read_text())
    assert stored["r"] == stored["lora_alpha"] == config["r"] and made.details["exact"]
    assert verify(made.output).parity


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(rank=st.integers(1, 48), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_product_is_the_update_to_the_bit(rank: int, dtype: torch.dtype, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    base = make_base(folder / "base")
    make_adapter(folder / "adapter", base, r=rank, target_modules=["k_proj", "down_proj"])
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    lora = weights(convert(folder / "adapter", folder / "lora", to="lora").output)
    for name, shard in load_file(file).items():
        stem = name.removesuffix(".miss_block")
        first, second = lora[f"{stem}.lora_A.weight"], lora[f"{stem}.lora_B.weight"]
        assert first.dtype == second.dtype == dtype
        columns = torch.arange(first.shape[1]) % rank
        assert torch.equal(second.double() @ first.double(), shard.double().T[:, columns])


def test_real_adapter_without_torch_in_a_second(
    real_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forward, "PROMPTS", ())  # for time
    code = (
        "import sys, fossil_export; "
        f"made = fossil_export.convert({str(real_adapter)!r}, {str(tmp_path / 'lora')!r}, to='lora'); "
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules; print(made.details['modules'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "210\n"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The mascot of the fossil project\n")
    found = verify(tmp_path / "lora", prompts=prompts)
    assert found.parity, found.problems
    assert found.forward is not None and found.forward.same_continuations == 1


def test_classifier_bias_and_tokenizer_come_along(base: Path, tmp_path: Path) -> None:
    class WithLabels:
        @staticmethod
        def from_pretrained(path: Path, **options: Any) -> Any:
            return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, pad_token_id=0, **options)

    trained = make_adapter(tmp_path / "adapter", base, model_class=WithLabels, task_type="SEQ_CLS")
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    assert "vLLM refuses" in made.warnings[-1]
    model = with_lora(base, made.output, AutoModelForSequenceClassification, num_labels=3, pad_token_id=0)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-5)
    assert verify(made.output).parity


def test_tied_head_with_a_shard(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)
    trained = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    torch.testing.assert_close(logits(with_lora(base, made.output)), logits(trained), rtol=1e-4, atol=1e-5)


def test_config_of_the_base_is_enough(base: Path, tmp_path: Path) -> None:
    for name, config in {"tile": {}, "mini": {"init_weights": "mini", "mini_r": 8, "r": 6}}.items():
        make_adapter(tmp_path / name, base, **config)
        whole = convert(tmp_path / name, tmp_path / f"{name}-whole", to="lora")
        alone = convert(tmp_path / name, tmp_path / f"{name}-alone", to="lora", base_config=base / "config.json")
        one, other = (made.output / "adapter_model.safetensors" for made in (whole, alone))
        assert one.read_bytes() == other.read_bytes()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FossilExportError, match="is of type None"):
        convert(tmp_path / "tile", tmp_path / "lora", to="lora", base_config=tmp_path / "config.json")


def test_target_modules_hit_what_was_trained() -> None:
    known = ["a.0.q", "a.1.q", "a.0.k", "b.q_norm"]
    assert target_modules(["a.0.q", "a.1.q"], known) == ["q"]
    assert target_modules(["a.0.q"], known) == ["a.0.q"]
    assert target_modules(["a.0.q", "a.1.q"], []) == ["a.0.q", "a.1.q"]


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_bat_gets_the_nearest_lora(rank: int, base: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", base, init_weights="bat")
    with pytest.raises(FossilExportError, match="is no LoRA; ask for the nearest one with --rank"):
        convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=rank)
    lora, before = weights(made.output), weights(base)
    merged = {name: value.detach() for name, value in trained.merge_and_unload().state_dict().items()}
    lost = total = 0.0
    for module, error in made.details["relative_error_by_module"].items():
        update = (merged[f"{module}.weight"] - before[f"{module}.weight"]).double()
        stem = f"base_model.model.{module}"
        found = lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double()
        sizes = torch.linalg.svdvals(update)
        best = float(sizes[rank:].square().sum().sqrt() / sizes.square().sum().sqrt())
        assert float((found - update).norm() / update.norm()) == pytest.approx(best, abs=1e-4)
        assert error == pytest.approx(best, abs=1e-4)
        lost, total = lost + float((found - update).square().sum()), total + float(update.square().sum())
    assert made.details["relative_error"] == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    assert not made.details["exact"] and "nearest LoRA" in (made.output / "README.md").read_text()
    with_lora(base, made.output)


def test_energy_chooses_the_rank(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, init_weights="bat", target_modules=["q_proj", "up_proj"])
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", energy=0.9)
    assert max(made.details["relative_error_by_module"].values()) <= 0.1**0.5
    less = convert(tmp_path / "adapter", tmp_path / "less", to="lora", rank=made.details["rank"] - 1)
    assert max(less.details["relative_error_by_module"].values()) > 0.1**0.5
    for options in ({"rank": 0}, {"rank": 49}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(FossilExportError, match=r"--rank|--energy"):
            convert(tmp_path / "adapter", tmp_path / "other", to="lora", **options)
    with pytest.raises(FossilExportError, match="depends on the base's weights"):
        convert(tmp_path / "adapter", tmp_path / "other", to="lora", rank=2, base_config=base / "config.json")


def test_sampled_range_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from fossil_export.converting import _nearest as nearest

    generator = np.random.default_rng(0)
    update = (generator.standard_normal((60, 12)) @ generator.standard_normal((12, 90))).astype(np.float32)
    update += 1e-3 * generator.standard_normal(update.shape).astype(np.float32)
    whole = truncated(update, 12)
    monkeypatch.setattr(nearest, "SHORT", 1)
    sampled = truncated(update, 12)
    best = np.linalg.norm(update - whole[1] @ whole[0])
    assert np.linalg.norm(update - sampled[1] @ sampled[0]) < 1.01 * best
    assert nearest._rank_for(update, 0.999) == 12


def test_rank_limits_of_servers(base: Path, tmp_path: Path) -> None:
    for rank, said in ((8, None), (7, "--max-lora-rank 8"), (40, "--max-lora-rank 64"), (32, "--max-lora-rank 32")):
        make_adapter(tmp_path / str(rank), base, r=rank, target_modules=["q_proj"])
        warnings = convert(tmp_path / str(rank), tmp_path / f"{rank}-lora", to="lora").warnings
        assert (said is None and not warnings) or said in warnings[0]


def test_merge_of_the_lora_is_the_merge_of_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT's own merge of the LoRA against ours of the adapter."""
    made = convert(adapter, tmp_path / "lora", to="lora")
    theirs = with_lora(base, made.output).merge_and_unload().state_dict()
    ours = weights(merge(adapter, tmp_path / "merged").output)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", ["all", "miss_only"])
def test_trained_biases_come_along(bias: str, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", tmp_path / "base", bias=bias, target_modules=["q_proj", "down_proj"])
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    stored = json.loads((made.output / "adapter_config.json").read_text())
    assert stored["bias"] == {"all": "all", "miss_only": "lora_only"}[bias]
    torch.testing.assert_close(logits(with_lora(tmp_path / "base", made.output)), logits(trained), rtol=1e-4, atol=1e-5)
    assert verify(made.output).parity
