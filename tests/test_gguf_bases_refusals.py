"""GGUF files that cannot be a base: one line each; and those of which something is lost: one line too."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bases import HIDDEN, WORDS, loaded, random, save, write
from hub_tools import cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from safetensors.numpy import save_file
from transformers import AutoConfig

import fossil_export
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.errors import CheckpointError, FossilExportError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model.gguf")


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("llama.")}
    return {key: float(value) if isinstance(value, float) else value for key, value in found.items()}


def tensors(path: Path) -> dict[str, Any]:
    return {one.name: (np.array(one.data), one.tensor_type.name) for one in gguf.GGUFReader(path).tensors}


def changed(model: Path, path: Path, more: dict[str, Any] | None = None, **values: Any) -> Path:
    """The model with other tensors (None: without it) and metadata."""
    path.parent.mkdir(exist_ok=True)
    found = tensors(model) | (more or {})
    save(path, "llama", metadata(model) | values, {key: value for key, value in found.items() if value is not None})
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(FossilExportError, match=match) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")


@pytest.fixture(scope="module")
def adapter_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a projection of the model, made without it."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    found = {}
    for layer in (0, 1):
        start = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        found[f"{start}.lora_A.weight"] = np.ones((2, HIDDEN), np.float32)
        found[f"{start}.lora_B.weight"] = np.ones((HIDDEN // 2, 2), np.float32)
    save_file(found, folder / "adapter_model.safetensors")
    return folder


def test_a_file_that_is_cut_anywhere_or_has_other_bytes_in_its_head(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    head = open_checkpoint(model).files[0].encoded
    path = tmp_path / "model.gguf"

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, len(whole) - 1))
    def cut(count: int) -> None:
        path.write_bytes(whole[:count])
        refused(path, "cut or corrupt|is no GGUF file")

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, len(head) - 1), st.integers(1, 255))
    def damaged(place: int, change: int) -> None:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        try:
            open_checkpoint(path)
        except FossilExportError as problem:
            assert "\n" not in str(problem)

    named = whole.replace(b"llama", b"ll\nma", 1)  # the name of the architecture
    path.write_bytes(named)
    refused(path, r"llama.cpp's ll\\nma, and read are")
    cut()
    damaged()


def test_sizes_that_no_file_has_are_not_believed(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    path = tmp_path / "model.gguf"
    for place in (8, 16):  # the numbers of tensors and keys
        path.write_bytes(whole[:place] + struct.pack("<Q", 1 << 60) + whole[place + 8 :])
        refused(path, "cut or corrupt")
    place = whole.index(b"blk.0.attn_q.weight") + 19 + 4  # its first size
    path.write_bytes(whole[:place] + struct.pack("<Q", 1 << 40) + whole[place + 8 :])
    refused(path, r"tensor blk\.0\.attn_q\.weight")


def test_a_head_that_claims_more_than_there_is_room_for_is_left_soon(model: Path, tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    name = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    path = tmp_path / "model.gguf"
    for tensors, pairs, more, match in (
        (1, 2, text(b"words") + struct.pack("<IIQ", 9, 8, 1 << 30), "words has 1073741824 words"),
        (1, 2, text(b"numbers") + struct.pack("<IIQ", 9, 11, 1 << 27), "ends within its head"),
        (1, 1 << 20, b"", "1,048,576 entries of metadata"),
        (1 << 20, 1, b"", "1,048,576 tensors"),
    ):
        with path.open("wb") as file:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs) + name + more)
            file.truncate(5 << 30)  # a hole: texts without end
        refused(path, match)


def test_text_of_a_file_does_not_steer_the_terminal(adapter_of: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save(path, "\x1b[31mred\x07", {}, {"token_embd.weight": (np.zeros((4, 4), np.float32), "F32")})
    told = cli("merge", str(adapter_of), "--base", str(path), "-o", str(tmp_path / "out"), code=1).stderr
    assert r"llama.cpp's \x1b[31mred\x07, and read are" in told and told.rstrip("\n").isprintable()


def test_what_is_only_dequantized_is_not_said_to_be_touched(model: Path, adapter_of: Path) -> None:
    told = cli("inspect", str(adapter_of), "--base", str(model)).stdout
    assert "touches 2 of 21 tensors" in told
    found = json.loads(cli("inspect", str(adapter_of), "--base", str(model), "--json").stdout)
    assert json.dumps(found).count('"action": "merge"') == 2 and '"dequantize"' not in json.dumps(found)


def test_an_output_beside_the_file_lies_inside_its_folder(model: Path, adapter_of: Path) -> None:
    with pytest.raises(FossilExportError, match=f"lies inside {model.parent}, which is only read"):
        fossil_export.merge(adapter_of, model.parent / "out", base=model)


def test_other_versions_and_byte_orders(model: Path, tmp_path: Path) -> None:
    whole, path = model.read_bytes(), tmp_path / "model.gguf"
    for version, match in ((b"\1\0\0\0", "version 1"), (b"\0\0\0\3", "big-endian")):
        path.write_bytes(whole[:4] + version + whole[8:])
        refused(path, match)


def test_a_file_of_another_kind_is_told_by_its_first_bytes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGJT" + model.read_bytes()[4:])
    refused(path, "is no GGUF file")


def test_parts_of_a_model(model: Path, tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(model.read_bytes())
    refused(part, "one of 3 parts of a model; join them with llama-gguf-split --merge")
    refused(changed(model, tmp_path / "other.gguf", **{"split.count": 2}), "one of 2 parts")


def test_a_folder_with_several(model: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(model.read_bytes())
    refused(tmp_path, r"holds several GGUF files \(one.gguf, two.gguf\); name one of these")


def test_an_adapter_is_no_base(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "model.gguf", **{"general.type": "adapter"})
    refused(path, "is an adapter, not a base model")


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save(path, "rwkv7", {}, {"token_embd.weight": (np.zeros((4, 4), np.float32), "F32")})
    refused(path, "is a model of llama.cpp's rwkv7, and read are llama, .*; merge into the model's safetensors instead")


def test_types_that_the_library_does_not_dequantize(model: Path, tmp_path: Path) -> None:
    whole = np.zeros((HIDDEN, HIDDEN), np.int32)
    path = changed(model, tmp_path / "model.gguf", {"blk.0.attn_q.weight": (whole, "I32")})
    refused(path, "blk.0.attn_q.weight is stored as I32, which gguf does not dequantize")


def test_tensors_that_are_missing_or_have_no_place(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "missing.gguf", {"blk.1.ffn_up.weight": None})
    refused(path, r"has no tensor for model\.layers\.1\.mlp\.up_proj\.weight")
    bias = np.zeros(HIDDEN, np.float32)
    path = changed(model, tmp_path / "more.gguf", {"blk.1.attn_q.bias": (bias, "F32")})
    refused(path, r"has no place for blk\.1\.attn_q\.bias")
    # As a mixture of experts has them, of which transformers would make random dense layers.
    experts = {f"blk.{n}.ffn_{part}.weight": None for n in (0, 1) for part in ("gate", "up", "down")}
    path = changed(model, tmp_path / "experts.gguf", experts, **{"llama.expert_count": 4})
    refused(path, r"has no tensor for model\.layers\.0\.mlp\.gate_proj\.weight")


def test_shapes_that_are_not_those_of_the_metadata(model: Path, tmp_path: Path) -> None:
    other = random(np.random.default_rng(0), (HIDDEN // 2, HIDDEN), "Q8_0")
    path = changed(model, tmp_path / "model.gguf", {"blk.0.attn_q.weight": other})
    refused(
        path, r"blk\.0\.attn_q\.weight \[128, 256\] is not model\.layers\.0\.self_attn\.q_proj\.weight \[256, 256\]"
    )


def test_metadata_of_which_no_model_is_made(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "model.gguf", **{"llama.attention.head_count": 0})
    refused(path, "transformers makes no llama of its metadata")


def test_a_scale_that_is_no_number_stops_the_merge(model: Path, adapter_of: Path, tmp_path: Path) -> None:
    raw, kind = tensors(model)["output.weight"]
    raw[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    path = changed(model, tmp_path / "gguf" / "model.gguf", {"output.weight": (raw, kind)})
    with pytest.raises(CheckpointError, match=r"output\.weight holds infinite or NaN scales"):
        fossil_export.merge(adapter_of, tmp_path / "out", base=path)
    assert not (tmp_path / "out").exists()


def test_what_transformers_does_not_read_is_told(model: Path, adapter_of: Path, tmp_path: Path) -> None:
    factors = np.ones(HIDDEN // 8, np.float32)
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = changed(model, tmp_path / "model.gguf", {"rope_freqs.weight": (factors, "F32")}, **scaled)
    plan = fossil_export.plan_merge(adapter_of, path)
    told = [line for line in plan.warnings if "transformers does not read" in line]
    assert len(told) == 1 and "\n" not in told[0]
    for name in ("rope_freqs.weight", "llama.rope.scaling.type", "llama.rope.scaling.factor"):
        assert name in told[0]
    assert not any("transformers does not" in line for line in fossil_export.plan_merge(adapter_of, model).warnings)


def test_a_tokenizer_that_cannot_be_had_is_told(model: Path, adapter_of: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "gguf" / "model.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mode1"))
    result = fossil_export.merge(adapter_of, tmp_path / "out", base=path)
    assert any("transformers makes no tokenizer of it" in line for line in result.warnings)
    assert sorted(file.name for file in result.output.iterdir()) == [
        "config.json",
        "fossil_export.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_file_on_the_hub_is_planned_from_its_head(
    model: Path, adapter_of: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add_folder("ada/packed", model.parent)
    plan = fossil_export.plan_merge(adapter_of, "hf://ada/packed/model.gguf")
    assert plan.base_name == "hf://ada/packed/model.gguf" and not plan.base.files[0].path.is_file()
    for name, base in (("of_hub", "ada/packed"), ("here", model)):
        fossil_export.merge(adapter_of, tmp_path / name, base=base)
    for file in (tmp_path / "here").iterdir():
        assert file.name == "fossil_export.json" or file.read_bytes() == (tmp_path / "of_hub" / file.name).read_bytes()


def test_safetensors_in_the_same_folder_win(model: Path, base: Path) -> None:
    (base / "model.gguf").write_bytes(model.read_bytes())
    assert all(name.suffix == ".safetensors" for name in (header.path for header in open_checkpoint(base).files))


def test_the_vocabulary_may_be_told_by_its_words_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "gguf" / "model.gguf", vocab_size=None)
    assert open_checkpoint(path).tensors["model.embed_tokens.weight"].shape == (WORDS, HIDDEN)


def test_the_config_beside_the_file_is_taken(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    path = write(tmp_path / "gguf" / "model.gguf", **changes)
    derived = dict(open_checkpoint(path).config or {})
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
    (path.parent / "config.json").write_text(json.dumps(derived | {"rope_parameters": scaling, "dtype": "bfloat16"}))
    found = open_checkpoint(path)
    wanted = loaded(path, tmp_path / "plain", config=AutoConfig.from_pretrained(path.parent))
    assert dict(found.config or {}) == json.loads((wanted / "config.json").read_text()) | {"dtype": "float32"}
    assert (found.config or {})["rope_parameters"] == scaling
    assert list(found.notes) == [f"{path}: the config.json beside it is taken"]
    (path.parent / "config.json").write_text(json.dumps(derived | {"rms_norm_eps": 0.1}))
    assert list(open_checkpoint(path).notes) == [
        f"{path}: the config.json beside it is taken, although the file says otherwise on rms_norm_eps"
    ]
    (path.parent / "config.json").write_text(json.dumps(derived | {"hidden_size": 2 * HIDDEN}))
    refused(path, "put the config.json of the original model beside the file, or merge into the model's safetensors")
    (path.parent / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as some repositories have it
    assert dict(open_checkpoint(path).config or {}) == derived
