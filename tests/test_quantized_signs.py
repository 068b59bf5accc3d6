"""What says that an adapter was trained over quantized weights, and how these were quantized."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json
from quantized_training import card, settings

from fossil_export import load_adapter, plan_merge
from fossil_export.adapters._quantized import Sign, agreed, quantized_training, settings_at, signs
from fossil_export.errors import AdapterError

AXOLOTL = """<details><summary>See axolotl config</summary>

axolotl version: `0.9.1`
```yaml
base_model: org/model
{}
```

</details><br>
"""

GPTQ = """The following `bitsandbytes` quantization config was used during training:
- quant_method: gptq
- bits: 4
"""

FACTORY = {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True, "bf16": True}
SWIFT = {
    "quant_method": "bnb",
    "quant_bits": 4,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def axolotl(*lines: str) -> str:
    return AXOLOTL.format("\n".join(lines))


def yaml(fields: dict[str, Any]) -> str:
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())


def how(sign: Sign) -> tuple[str | None, bool | None, str | None, tuple[str, ...] | None]:
    return sign.kind, sign.double_quant, sign.compute_dtype, sign.skip_modules


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("README.md", card(settings()), ("nf4", True, "bfloat16", None)),
        ("README.md", card(settings("fp4", False, "float16")), ("fp4", False, "float16", None)),
        ("README.md", card(settings(llm_int8_skip_modules=["lm_head"])), ("nf4", True, "bfloat16", ("lm_head",))),
        ("README.md", card(settings("int8")), ("int8", None, "float32", None)),
        ("README.md", axolotl("load_in_4bit: true", "adapter: qlora", "bf16: true"), ("nf4", True, "bfloat16", None)),
        (
            "README.md",
            axolotl("load_in_4bit: true", "adapter: qlora", "bnb_config_kwargs:", "  bnb_4bit_use_double_quant: false"),
            ("nf4", False, None, None),
        ),
        (
            "README.md",
            axolotl("load_in_8bit: true", "load_in_4bit: false", "adapter: lora"),
            ("int8", None, None, None),
        ),
        ("training_args.yaml", yaml(FACTORY), ("nf4", True, "bfloat16", None)),
        ("training_args.yaml", yaml(FACTORY | {"quantization_bit": 8}), ("int8", None, None, None)),
        ("args.json", json.dumps(SWIFT), ("nf4", True, "bfloat16", None)),
        ("args.json", json.dumps(SWIFT | {"quant_bits": 8}), ("int8", None, None, None)),
    ],
)
def test_what_trainers_write_says_how(file: str, text: str, wanted: Any, adapter: Path) -> None:
    (adapter / file).write_text(text)
    (sign,) = signs(load_adapter(adapter))
    assert how(sign) == wanted and sign.is_certain and file in sign.where


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("README.md", "- load_in_4bit: True\n", None),
        ("README.md", "The following `bitsandbytes` quantization config was used during training:\n", None),
        ("README.md", card(settings()).replace("- bnb_4bit_use_double_quant: True\n", ""), "nf4"),
        ("README.md", GPTQ, "gptq"),
        ("README.md", axolotl("load_in_4bit: true", "adapter: lora"), None),
        ("training_args.yaml", yaml(FACTORY | {"quantization_method": "hqq"}), "hqq"),
        ("args.json", json.dumps(SWIFT | {"quant_method": "hqq"}), "hqq"),
        ("args.json", json.dumps(SWIFT | {"quant_bits": 2}), None),
    ],
)
def test_what_does_not_say_how_is_told_and_the_base_left_as_it_is(
    file: str, text: str, kind: str | None, adapter: Path
) -> None:
    (adapter / file).write_text(text)
    (sign,) = signs(load_adapter(adapter))
    assert sign.kind == kind and not sign.is_certain
    plan = plan_merge(adapter)
    (line,) = [line for line in plan.warnings if "was trained over quantized weights, it seems" in line]
    assert "--trained-on" in line and plan.trained_on is None and plan.count("dequantize") == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", axolotl("load_in_8bit: false", "load_in_4bit: false", "adapter: lora")),
        ("README.md", axolotl("load_in_8bit: false", "# load_in_4bit: true")),
        ("README.md", axolotl("load_in_4bit: [", "adapter: qlora")),
        ("README.md", "Quantization config: none. It was loaded in 4 bits elsewhere."),
        ("training_args.yaml", yaml(FACTORY | {"quantization_bit": None})),
        ("args.json", json.dumps({"quant_method": None, "quant_bits": None, "bnb_4bit_quant_type": "nf4"})),
        ("args.json", "{"),
        ("args.json", "[4]"),
        ("training_args.bin", "quantization_bit"),
    ],
)
def test_other_settings_say_nothing(file: str, text: str, adapter: Path) -> None:
    (adapter / file).write_text(text)
    assert quantized_training(load_adapter(adapter)) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", None),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", None),
        ("TheBloke/Mistral-7B-GPTQ", "gptq"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "gptq"),
        ("casperhansen/llama-3-8b-instruct-awq", "awq"),
        ("RedHatAI/Llama-3.1-8B-FP8", "fp8"),
    ],
)
def test_names_say_that_it_was_quantized(name: str, kind: str | None, adapter: Path) -> None:
    (sign,) = signs(replace(load_adapter(adapter), base_model=name))
    assert sign.kind == kind and not sign.is_certain and name in sign.where


def test_settings_of_aliases_that_stand_for_more_than_memory_are_passed_over(adapter: Path) -> None:
    aliases = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    more = "bnb_config_kwargs: {bnb_4bit_compute_dtype: *a11, llm_int8_skip_modules: *a11}"
    text = axolotl("load_in_4bit: true", "adapter: qlora", "a0: &a0 [x]", *aliases, more)
    (adapter / "README.md").write_text(text)
    assert quantized_training(load_adapter(adapter)) is None


def test_signs_that_contradict_each_other_are_refused_with_both(adapter: Path) -> None:
    (adapter / "README.md").write_text(card(settings()))
    (adapter / "args.json").write_text(json.dumps(SWIFT | {"bnb_4bit_use_double_quant": False}))
    match = r"its README.md .* \(nf4 with double.*and its args.json .*without double .*; say with --trained-on"
    with pytest.raises(AdapterError, match=match):
        plan_merge(adapter)
    assert plan_merge(adapter, trained_on=settings()).trained_on is not None
    assert plan_merge(adapter, trained_on="unquantized").trained_on is None
    (adapter / "args.json").write_text(json.dumps(SWIFT))
    assert plan_merge(adapter).trained_on is not None


def test_a_vague_sign_beside_a_certain_one_changes_nothing(adapter: Path) -> None:
    (adapter / "README.md").write_text(card(settings()))
    found = agreed(signs(replace(load_adapter(adapter), base_model="unsloth/model-bnb-4bit")), "adapter")
    assert found is not None and how(found) == ("nf4", True, "bfloat16", None)


def test_a_quantized_base_that_is_at_hand_tells_how_the_original_was_quantized(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """As after training with unsloth: its own 4-bit model is named, and the original one is given."""
    named = tmp_path / "model-bnb-4bit"
    named.mkdir()
    config = json.loads((base / "config.json").read_text())
    asked = settings(quant_method="bitsandbytes", llm_int8_skip_modules=["lm_head", "gate_proj"])
    (named / "config.json").write_text(json.dumps(config | {"quantization_config": asked}))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(named))
    plan = plan_merge(adapter, base)
    assert plan.seen.skip_modules == ("lm_head", "gate_proj")
    record = plan.to_dict()["trained_on"]
    assert (record["kind"], record["double_quant"]) == ("nf4", True) and str(named) in record["found_in"]
    assert not [name for name in plan.seen.tensors if "gate_proj" in name]
    assert [name for name in plan.seen.tensors if "up_proj" in name]


def test_the_same_in_the_cache_of_the_hub(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    storage = tmp_path / "cache" / "models--org--model-bnb-4bit"
    (storage / "snapshots" / "c0").mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text("c0")
    asked = settings(quant_method="bitsandbytes")
    (storage / "snapshots" / "c0" / "config.json").write_text(json.dumps({"quantization_config": asked}))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/model-bnb-4bit")
    plan = plan_merge(adapter, base)
    assert plan.trained_on is not None and plan.seen.where == "org/model-bnb-4bit is quantized"


def test_what_axolotl_loads_in_another_way_is_not_certain(base: Path, adapter: Path) -> None:
    (adapter / "README.md").write_text(axolotl("load_in_4bit: true", "adapter: qlora", "bf16: true"))
    assert plan_merge(adapter).trained_on is not None
    (sign,) = signs(load_adapter(adapter))
    assert "falcon_h1" in sign.apart


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("README.md", card(settings()).replace("\n", "\r\n"), ("nf4", True, "bfloat16", None)),
        ("README.md", axolotl("load_in_4bit: true", "adapter: qlora", "bf16: auto"), ("nf4", True, "bfloat16", None)),
        (
            "README.md",
            axolotl("load_in_8bit: true").removeprefix("<details><summary>"),
            ("int8", None, None, None),
        ),
        ("training_args.yaml", "\ufeff" + yaml(FACTORY), ("nf4", True, "bfloat16", None)),
        ("training_args.yaml", yaml(FACTORY | {"bf16": False, "pure_bf16": True}), ("nf4", True, "bfloat16", None)),
        ("args.json", "\ufeff" + json.dumps(SWIFT), ("nf4", True, "bfloat16", None)),
    ],
)
def test_other_ways_to_write_the_same_say_the_same(file: str, text: str, wanted: Any, adapter: Path) -> None:
    (adapter / file).write_bytes(text.encode())
    (sign,) = signs(load_adapter(adapter))
    assert how(sign) == wanted


@pytest.mark.parametrize("value", ['!!int ""', '!!float ""', '!!timestamp "x"', '!!bool "x"', "[" * 20000, "1" * 5000])
@pytest.mark.parametrize("file", ["README.md", "training_args.yaml"])
def test_yaml_that_is_broken_says_nothing(value: str, file: str, adapter: Path) -> None:
    line = f"load_in_4bit: {value}"
    (adapter / file).write_text(axolotl(line) if file == "README.md" else line)
    assert signs(load_adapter(adapter)) == ()


def test_json_that_is_too_deep_says_nothing(adapter: Path, tmp_path: Path) -> None:
    deep = '{"quantization_config": ' + "[" * 200_000
    (adapter / "args.json").write_text(deep)
    assert signs(load_adapter(adapter)) == ()
    (tmp_path / "config.json").write_text(deep)
    assert settings_at(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["See axolotl config ", "See axolotl config ```yaml\n", "quantization config was used during training: \n"]
)
def test_a_card_that_begins_again_and_again_is_soon_read(text: str, adapter: Path) -> None:
    (adapter / "README.md").write_text((text * 60_000)[:1_000_000])
    started = time.perf_counter()
    signs(load_adapter(adapter))
    assert time.perf_counter() - started < 5


def test_what_is_no_methods_name_is_not_shown(adapter: Path) -> None:
    (adapter / "args.json").write_text(json.dumps({"quant_method": "\x1b[2J\nall is well"}))
    (sign,) = signs(load_adapter(adapter))
    assert (sign.kind, sign.where) == (None, "its args.json has quant_method")


@pytest.mark.parametrize(
    "name",
    [
        "/models/llama-bnb-4bit/",
        "C:\\models\\llama-bnb-4bit",
        "/x/hub/models--unsloth--llama-bnb-4bit/snapshots/0a1b2c",
    ],
)
def test_a_folder_tells_by_its_name_too(name: str, adapter: Path) -> None:
    (sign,) = signs(replace(load_adapter(adapter), base_model=name))
    assert name in sign.where


def test_the_other_bits_of_llama_factory_have_no_kind_of_four(adapter: Path) -> None:
    (adapter / "training_args.yaml").write_text(yaml(FACTORY | {"quantization_type": "int8"}))
    (sign,) = signs(load_adapter(adapter))
    assert not sign.is_certain
