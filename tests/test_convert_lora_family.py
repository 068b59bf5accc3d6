"""LoRA, as it was trained, becomes the LoRA that servers and llama.cpp read, and one of a smaller rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import QV, make_adapter, make_base, weights
from convert_tools import logits, with_lora
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert, verify
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS, POSITIVE, Arrays, Base, Field, Numbers, Shapes

PREFIX = "base_model.model."
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 13}
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"lora_alpha": 16}, True),
    "alpha": ({"lora_alpha": 13}, True),
    "rslora": ({"use_rslora": True, "lora_alpha": 13}, True),
    "rslora of rank 6": ({"use_rslora": True, "r": 6, "target_modules": ["q_proj", "down_proj"]}, True),
    "ranks": ({"rank_pattern": {"q_proj": 4, r"layers\.1\..*up_proj": 2}}, True),
    "ranks and rslora": ({"rank_pattern": {"q_proj": 4, "v_proj": 3}, "use_rslora": True}, False),
    "alphas": ({"alpha_pattern": {"v_proj": 3, r"layers\.0\..*up_proj": 16}}, False),
    "alphas by a power of two": ({"alpha_pattern": {"v_proj": 2, "o_proj": 32}}, True),
    "some layers": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, True),
    "embedding": (EMBEDDING, True),
    "head": ({"target_modules": ["lm_head", "q_proj"], "lora_alpha": 3}, True),
}


def double(base: Path, folder: Path) -> Any:
    """The live model in float64, unmerged."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder)
    return model.to(torch.float64)


def by_formula(folder: Path) -> dict[str, torch.Tensor]:
    """alpha / r · B A of every module, as a server has it that reads r and lora_alpha alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found, scale = {}, config["lora_alpha"] / config["r"]
    tensors = {name: value.double() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    for name, first in tensors.items():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if name.endswith(a):
                product = scale * tensors[name.replace(a, b)].flatten(1) @ first.flatten(1)
                found[name.removeprefix(PREFIX).removesuffix(f".{a}")] = product if "embedding" not in a else product.T
    return found


def live(trained: Any) -> dict[str, torch.Tensor]:
    """PEFT's own update of every module, in float64."""
    trained = trained.to(torch.float64)
    named = trained.base_model.model.named_modules()
    return {name: m.get_delta_weight("default").detach() for name, m in named if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_lora_is_what_peft_and_servers_without_patterns_make_of_it(name: str, base: Path, tmp_path: Path) -> None:
    config, exact = SETTINGS[name]
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **config)
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    wanted, found = live(trained), by_formula(made.output)
    assert wanted.keys() == found.keys() and made.details["modules"] == len(wanted)
    limit = 1e-14 if exact else 1e-7
    for module in wanted:
        assert float((found[module] - wanted[module]).norm() / wanted[module].norm()) < limit, module
    assert made.details["exact"] is exact and (exact or 0 < made.details["relative_error"] < 1e-7)
    assert any("no powers of two" in line for line in made.warnings) is not exact
    with_lora(base, made.output)
    torch.testing.assert_close(
        logits(double(base, made.output)), logits(double(base, tmp_path / "adapter")), rtol=1e-5, atol=1e-7
    )
    assert "use_rslora" in (written := json.loads((made.output / "adapter_config.json").read_text()))
    assert not written["use_rslora"] and ("rank_pattern" in written) == ("ranks" in name)
    assert verify(made.output, level="weights").parity


def test_tensors_of_one_scale_stay_to_the_bit(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, r=6, lora_alpha=16, use_rslora=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(file).items()}, file)
    before, after = load_file(file), weights(convert(tmp_path / "adapter", tmp_path / "lora", to="lora").output)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 16 / 6**0.5  # not off by a bit


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rank=st.integers(1, 24),
    other=st.integers(1, 24),
    alpha=st.integers(1, 64),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_rank_alpha_and_dtype(rank: int, other: int, alpha: int, rslora: bool, dtype: Any, bases: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary), bases / "one"
        config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": {"v_proj": other}}
        make_adapter(folder / "adapter", base, kind=LoraConfig, target_modules=QV, **config)
        file = folder / "adapter" / "adapter_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
        made = convert(folder / "adapter", folder / "lora", to="lora")
        wanted, found = live(double(base, folder / "adapter")), by_formula(made.output)
        for module in wanted:
            error = float((found[module] - wanted[module]).norm() / wanted[module].norm())
            loose = 1e-6 if dtype == torch.float16 else 1e-7  # the least numbers of float16 have few bits
            assert error < (1e-14 if made.details["exact"] else loose)
        assert verify(made.output, level="weights").parity


def test_biases_of_lora_come_along_and_are_scaled_with_the_rest(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120}
    torch.manual_seed(0)
    base = tmp_path / "base"
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(base)
    config = {"lora_bias": True, "target_modules": QV, "lora_alpha": 16, "alpha_pattern": {"v_proj": 3}}
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **config)
    made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora")
    assert json.loads((made.output / "adapter_config.json").read_text())["lora_bias"] is True
    assert any("lora_bias" in line for line in made.warnings)
    found, wanted = double(base, made.output), double(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-6, atol=1e-8)
    assert verify(made.output, level="weights").parity
    state = load_file(made.output / "adapter_model.safetensors")
    state[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias"][3] += 1e-3
    save_file(state, made.output / "adapter_model.safetensors")
    (problem,) = verify(made.output, level="weights").problems
    assert "layers.0.self_attn.q_proj.bias: is not the trained bias" in problem
    near = convert(tmp_path / "adapter", tmp_path / "near", to="lora", rank=4)
    assert any(name.endswith("lora_B.bias") for name in weights(near.output))


class TestCut:
    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_to_the_best_of_that_rank(self, rank: int, base: Path, tmp_path: Path) -> None:
        config = {**EMBEDDING, "rank_pattern": {"q_proj": 2}, "target_modules": ["embed_tokens", "q_proj", "up_proj"]}
        trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, **config)
        made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=rank)
        found, lost, total = by_formula(made.output), 0.0, 0.0
        for module, update in live(trained).items():
            sizes = torch.linalg.svdvals(update).square()
            best = float((sizes[rank:].sum() / sizes.sum()).sqrt())
            assert float((found[module] - update).norm() / update.norm()) == pytest.approx(best, abs=1e-6), module
            assert made.details["relative_error_by_module"][module] == pytest.approx(best, abs=2e-6)
            lost, total = lost + float(sizes[rank:].sum()), total + float(sizes.sum())
        assert made.details["relative_error"] == pytest.approx((lost / total) ** 0.5, abs=2e-6)
        assert made.details["rank"] == rank and not made.details["exact"]
        torch.testing.assert_close(  # PEFT reads what the formula says
            logits(double(base, made.output)), logits(double(base, by_hand(made.output, tmp_path))), rtol=0, atol=0
        )
        (problem,) = verify(made.output, level="weights").problems
        assert "were cut to a smaller rank than was trained" in problem
        assert ("q_proj" in problem) == (rank < 2)

    def test_to_the_rank_that_keeps_a_share(self, base: Path, tmp_path: Path) -> None:
        make_adapter(tmp_path / "adapter", base, kind=LoraConfig, r=16)
        made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", energy=0.8)
        assert max(made.details["relative_error_by_module"].values()) <= 0.2**0.5
        less = convert(tmp_path / "adapter", tmp_path / "less", to="lora", rank=made.details["rank"] - 1)
        assert max(less.details["relative_error_by_module"].values()) > 0.2**0.5

    def test_from_headers_of_the_base_alone(self, base: Path, tmp_path: Path) -> None:
        make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=QV)
        whole = convert(tmp_path / "adapter", tmp_path / "whole", to="lora", rank=2)
        alone = convert(tmp_path / "adapter", tmp_path / "alone", to="lora", rank=2, base_config=base)
        one, other = (made.output / "adapter_model.safetensors" for made in (whole, alone))
        assert one.read_bytes() == other.read_bytes()

    def test_not_to_a_rank_that_it_has(self, base: Path, tmp_path: Path) -> None:
        make_adapter(tmp_path / "adapter", base, kind=LoraConfig, rank_pattern={"q_proj": 3})
        for options in ({"rank": 8}, {"rank": 20}):
            with pytest.raises(FossilExportError, match="is a LoRA of rank 8 exactly; leave --rank and --energy out"):
                convert(tmp_path / "adapter", tmp_path / "lora", to="lora", **options)
        for options in ({"rank": 0}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}):
            with pytest.raises(FossilExportError, match=r"--rank|--energy"):
                convert(tmp_path / "adapter", tmp_path / "lora", to="lora", **options)

    def test_fossil_too(self, base: Path, tmp_path: Path) -> None:
        make_adapter(tmp_path / "adapter", base, target_modules=["down_proj"])
        whole = by_formula(convert(tmp_path / "adapter", tmp_path / "whole", to="lora").output)
        made = convert(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=3)
        for module, product in by_formula(made.output).items():
            sizes = torch.linalg.svdvals(whole[module])
            missing = float((product - whole[module]).norm())
            assert missing == pytest.approx(float(sizes[3:].square().sum().sqrt()), rel=1e-5)


def by_hand(folder: Path, tmp_path: Path) -> Path:
    """The same LoRA without patterns and of one scale: every A and B filled up with zeros, as a server pads them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state, rank = load_file(folder / "adapter_model.safetensors"), config["r"]
    for name, value in state.items():
        if "lora_A" in name or "embedding_A" in name:
            state[name] = torch.nn.functional.pad(value, (0, 0, 0, rank - len(value)))
        elif "lora_B" in name or "embedding_B" in name:
            state[name] = torch.nn.functional.pad(value, (0, rank - value.shape[1]))
    (tmp_path / "padded").mkdir()
    save_file(state, tmp_path / "padded" / "adapter_model.safetensors")
    plain = {**config, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "padded" / "adapter_config.json").write_text(json.dumps(plain))
    return tmp_path / "padded"


class Rows(Base):
    """W' = diag(1 + g) W: an update that depends on the weight, and is of full rank."""

    PEFT: Mapping[str, Mapping[str, str]] = MappingProxyType({"ROWS": {"rows_g": "g"}})
    FIELDS: Mapping[str, Field] = MappingProxyType({"r": POSITIVE})

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        return {}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        return None if shapes["g"][0] == weight[0] else "it is of other rows"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"g": arrays["g"][start:stop]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["g"][start : start + len(weight), None] * weight


class RowBias(Rows):
    PEFT: Mapping[str, Mapping[str, str]] = MappingProxyType({"ROWS": {"rows_b": "g"}})
    PARAMETER = "bias"


MODULES = {"model.layers.0.self_attn.q_proj": 48, "model.layers.1.mlp.up_proj": 96, "model.embed_tokens": 120}


@pytest.fixture
def rows(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(METHODS, "rows", Rows())
    monkeypatch.setitem(METHODS, "row_bias", RowBias())
    folder = tmp_path / "rows"
    folder.mkdir()
    state = {f"{PREFIX}{m}.rows_g": torch.linspace(-0.5, 0.5, size) for m, size in MODULES.items()}
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "ROWS", "r": 1, "base_model_name_or_path": str(base), "bias": "rows_only"}
    config["target_modules"] = "all-linear"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class TestNearest:
    def test_of_any_method_and_of_an_embedding(self, rows: Path, base: Path, tmp_path: Path) -> None:
        before = weights(base)
        with pytest.raises(FossilExportError, match=r"is a rows adapter, which is no LoRA; ask for the nearest"):
            convert(rows, tmp_path / "lora", to="lora")
        with pytest.raises(FossilExportError, match="a rows adapter depends on the base's weights"):
            convert(rows, tmp_path / "lora", to="lora", rank=2, base_config=base)
        made = convert(rows, tmp_path / "lora", to="lora", rank=20)
        assert f"{PREFIX}model.embed_tokens.lora_embedding_A" in weights(made.output)
        for module, product in by_formula(made.output).items():
            update = torch.linspace(-0.5, 0.5, MODULES[module])[:, None] * before[f"{module}.weight"]
            sizes = torch.linalg.svdvals(update.double()).square()
            best = float((sizes[20:].sum() / sizes.sum()).sqrt())
            assert float((product - update).norm() / update.norm()) == pytest.approx(best, abs=1e-5)
            assert made.details["relative_error_by_module"][module] == pytest.approx(best, abs=1e-5)
        assert json.loads((made.output / "adapter_config.json").read_text())["bias"] == "lora_only"
        live_model = live(with_lora(base, made.output))
        for module, product in by_formula(made.output).items():
            torch.testing.assert_close(live_model[module], product)

    def test_not_of_what_a_lora_has_no_place_for(self, rows: Path, base: Path, tmp_path: Path) -> None:
        state = load_file(rows / "adapter_model.safetensors")
        save_file({**state, f"{PREFIX}model.norm.rows_b": torch.ones(48)}, rows / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"rows_b changes model\.norm\.bias as row_bias, for which a LoRA"):
            convert(rows, tmp_path / "lora", to="lora", rank=2)

    def test_not_of_an_embedding_that_is_the_head_too(self, rows: Path, tmp_path: Path) -> None:
        base = make_base(tmp_path / "tied", tie=True)
        with pytest.raises(AdapterError, match=r"embed_tokens, which the base ties to its head, and a LoRA would"):
            convert(rows, tmp_path / "lora", to="lora", rank=2, base=base)

    def test_not_of_a_vector_taken_for_a_matrix(self, rows: Path, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(Rows, "dimensions", lambda self, shapes: 1)
        save_file({f"{PREFIX}model.norm.rows_g": torch.ones(48)}, rows / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"rows_g changes model\.norm\.weight as rows, for which a LoRA has no"):
            convert(rows, tmp_path / "lora", to="lora", rank=1)

    def test_a_gguf_points_to_it(self, rows: Path, base: Path, tmp_path: Path) -> None:
        with pytest.raises(FossilExportError, match=r"is a rows adapter.*--to lora with --rank"):
            convert(rows, tmp_path / "x.gguf", to="gguf-lora")


def test_convolutions_come_along(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base, images = tmp_path / "base", torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(base)
    kind = AutoModelForImageClassification
    config = {"target_modules": ["projection", "fc1"], "alpha_pattern": {"projection": 3}, "r": 4}
    trained = make_adapter(tmp_path / "adapter", base, kind=LoraConfig, model_class=kind, **config).to(torch.float64)
    folders = [convert(tmp_path / "adapter", tmp_path / f"{rank}", to="lora", rank=rank).output for rank in (None, 3)]
    with torch.no_grad():
        wanted = trained(images).logits
        for folder, least, most in zip(folders, (0, 1e-7), (1e-6, 1), strict=True):
            model = PeftModel.from_pretrained(kind.from_pretrained(base), folder).to(torch.float64).eval()
            assert least <= (model(images).logits - wanted).abs().max() / wanted.abs().max() < most
    shape = weights(folders[1])[f"{PREFIX}vit.embeddings.patch_embeddings.projection.lora_A.weight"].shape
    assert shape == (3, 3, 4, 4) and verify(folders[0], level="weights").parity


def test_a_lora_is_no_miss(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, kind=LoraConfig, target_modules=QV)
    with pytest.raises(FossilExportError, match=r"is a lora adapter, of which PEFT's MISS has no form; .*--to lora"):
        convert(tmp_path / "adapter", tmp_path / "miss", to="miss")
