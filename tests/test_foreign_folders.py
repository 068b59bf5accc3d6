"""Folders of other trainers and of wrapped models give the bytes of PEFT's folder, or are refused."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QV, edit_json, make_adapter, make_base, weights
from hub_tools import LoopbackHub
from peft import LoraConfig
from safetensors.torch import save_file

from fossil_export import load_adapter, merge, verify
from fossil_export.errors import AdapterError

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, PEFT's folder of a LoRA with a trained head, and its merge."""
    folder = tmp_path_factory.mktemp("foreign")
    base = make_base(folder / "base")
    make_adapter(folder / "peft", base, kind=LoraConfig, target_modules=QV, modules_to_save=["lm_head"])
    merge(folder / "peft", folder / "merged")
    return folder


def rewritten(scene: Path, folder: Path, rename: Rename, pickled: bool = False) -> Path:
    """PEFT's folder with other keys."""
    shutil.copytree(scene / "peft", folder)
    tensors = {rename(name): value for name, value in weights(scene / "peft").items()}
    if pickled:
        (folder / FILE).unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / FILE)
    return folder


def same_bytes(one: Path, two: Path) -> bool:
    files = sorted(one.glob("*.safetensors"))
    return bool(files) and all(file.read_bytes() == (two / file.name).read_bytes() for file in files)


def named(name: str) -> str:
    """As in the whole state dict of a PeftModel."""
    name = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name)
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


RENAMES: dict[str, Rename] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled by regions": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    "activation checkpoints": lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "all of them": lambda name: (
        "_orig_mod._fsdp_wrapped_module." + named(name).replace(".layers.1.", ".layers.1._checkpoint_wrapped_module.")
    ),
    "adapter's name": named,
    "another adapter's name": lambda name: named(name).replace(".default.", ".policy."),
    "data in parallel": lambda name: f"module.{name}",
    "transformers without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "ms-swift": lambda name: re.sub(r"(lora_[AB])", r"\1.default", name.removeprefix("base_model.model.")),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", list(RENAMES))
def test_other_keys_give_the_bytes_of_pefts(kind: str, pickled: bool, scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "other", RENAMES[kind], pickled)
    assert not load_adapter(folder).is_pefts
    merge(folder, tmp_path / "merged")
    assert same_bytes(scene / "merged", tmp_path / "merged")


def test_its_forward_pass_is_checked_without_peft(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "other", RENAMES["ms-swift"])
    merge(folder, tmp_path / "merged")
    assert verify(tmp_path / "merged").parity


def test_the_original_module_beside_a_trained_one_is_not_taken(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "other", named)
    tensors = weights(folder)
    tensors["base_model.model.lm_head.original_module.weight"] = torch.zeros(120, 48)
    save_file(tensors, folder / FILE)
    merge(folder, tmp_path / "merged")
    assert same_bytes(scene / "merged", tmp_path / "merged")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda t: {**t, **{named(n): v for n, v in t.items() if "lora_A" in n}}, "twice"),
        (lambda t: {**t, **{f"_orig_mod.{n}": v for n, v in t.items() if "lora_A" in n}}, "twice"),
        (lambda t: {n.replace("lora_A.", "lora_A.reference."): v for n, v in t.items()}, "does not know|missing"),
        (lambda t: {n.replace("base_model.model.", "") if "lora_A" in n else n: v for n, v in t.items()}, "not named"),
        (lambda t: {f"module.{n}" if "lora_A" in n else n: v for n, v in t.items()}, "not named"),
        (lambda t: {n.replace("lora_A.", "lora_A.0."): v for n, v in t.items()}, "several matrices"),
        (lambda t: {n: v for n, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in n}, "missing"),
    ],
)
def test_keys_that_may_mean_two_things_are_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], why: str, scene: Path, tmp_path: Path
) -> None:
    folder = rewritten(scene, tmp_path / "other", lambda name: name)
    changed = {name: value.clone() for name, value in change(weights(scene / "peft")).items()}
    save_file(changed, folder / FILE)
    with pytest.raises(AdapterError, match=why):
        load_adapter(folder)


FIELDS: dict[str, dict[str, Any]] = {
    "unsloth": {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "target_modules": r"(?:.*?(?:language|text|model).*?(?:self_attn|attention).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))",
    },
    "ms-swift's own LoRA": {
        "swift_type": "LORA", "model_key_mapping": None, "use_qa_lora": False, "use_merged_linear": False,
        "enable_lora": None, "lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FIELDS))
def test_fields_that_change_nothing_change_nothing(kind: str, scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "other", lambda name: name)
    edit_json(folder / CONFIG, **FIELDS[kind])
    merge(folder, tmp_path / "merged")
    assert same_bytes(scene / "merged", tmp_path / "merged")


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"use_qa_lora": True}, "pooled"),
        ({"use_merged_linear": True}, "parts of a fused weight"),
        ({"swift_type": "LONGLORA"}, "another method of ms-swift"),
    ],
)
def test_fields_that_change_the_meaning_are_refused(
    fields: dict[str, Any], why: str, scene: Path, tmp_path: Path
) -> None:
    folder = rewritten(scene, tmp_path / "other", lambda name: name)
    edit_json(folder / CONFIG, **fields)
    with pytest.raises(AdapterError, match=why):
        load_adapter(folder)


def test_what_ms_swift_writes_beside_the_adapter(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "out" / "default", lambda name: name)
    (folder / "configuration.json").write_text("{}")
    written = {"lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06}
    (folder / "additional_config.json").write_text(json.dumps(written))
    merge(folder, tmp_path / "merged")
    assert same_bytes(scene / "merged", tmp_path / "merged")
    (folder / "additional_config.json").write_text(json.dumps(written | {"gate": 1}))
    with pytest.raises(AdapterError, match=r"additional_config\.json: sets gate"):
        load_adapter(folder)
    (folder / "additional_config.json").unlink()
    found = load_adapter(tmp_path / "out")
    assert found.path == folder and found.name == str(folder) and "in its folder default is taken" in found.notes[0]
    shutil.copytree(folder, tmp_path / "out" / "other")
    with pytest.raises(
        AdapterError, match=r"2 in subfolders \(default, other\): name one of them, one is .*out/default"
    ):
        load_adapter(tmp_path / "out")
    (tmp_path / "out" / "extra_states").mkdir()
    (tmp_path / "out" / "extra_states" / CONFIG).write_text('{"extra_state_keys": ["lm_head.*"]}')
    with pytest.raises(AdapterError, match="holds whole weights, trained with the adapter"):
        load_adapter(folder)


def test_a_value_head_beside_the_adapter_is_not_lost_in_silence(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "ppo", lambda name: name)
    head = {"v_head.summary.weight": torch.ones(1, 48), "v_head.summary.bias": torch.ones(1)}
    for legacy in (False, True):
        torch.save(head, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(AdapterError, match="holds a value head"):
            load_adapter(folder)
    torch.save({"lm_head.weight": torch.ones(3)}, folder / "pytorch_model.bin")
    assert load_adapter(folder).trained
    (folder / "pytorch_model.bin").unlink()
    for name in ("value_head.safetensors", "value_head.bin"):
        (folder / name).write_bytes(b"")
        with pytest.raises(AdapterError, match=rf"{name}: holds a value head.*move it out"):
            load_adapter(folder)
        (folder / name).unlink()
    assert load_adapter(folder).trained


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_small_archive_that_unpacks_to_more_than_memory_is_refused(packed: int, scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "bomb", lambda name: name)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", packed) as archive:
        archive.writestr("archive/data.pkl", bytes(5 << 20))
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin: cannot be read \(archive/data\.pkl is not packed"):
        load_adapter(folder)


def test_a_packed_archive_is_looked_into_and_a_damaged_one_is_refused(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "packed", lambda name: name)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"v_head.summary.weight" + bytes(9000))
    with pytest.raises(AdapterError, match="holds a value head"):
        load_adapter(folder)
    content = bytearray(path.read_bytes())
    content[46:50] = b"\xff" * 4  # the beginning of the packed bytes, after a header of 30 and the name
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin: cannot be read \(Error -3 while decompressing"):
        load_adapter(folder)


def test_a_run_of_checkpoints_names_the_newest(scene: Path, tmp_path: Path) -> None:
    for step in (500, 1000, 60):
        shutil.copytree(scene / "peft", tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(AdapterError, match=r"\(checkpoint-1000, .*\): .*, the newest is .*run/checkpoint-1000$"):
        load_adapter(tmp_path / "run")
    assert load_adapter(tmp_path / "run" / "checkpoint-1000").trained


def test_a_run_on_the_hub_names_a_path_that_can_be_given(hub: LoopbackHub, scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene / "peft", tmp_path / "run" / "checkpoint-7")
    hub.add_folder("ada/run", tmp_path / "run")
    found = load_adapter("ada/run")
    assert found.name == "hf://ada/run/checkpoint-7" and found.revision == load_adapter(found.name).revision
    assert load_adapter("ada/run@main").name == found.name
    shutil.copytree(scene / "peft", tmp_path / "run" / "checkpoint-5")
    hub.add_folder("ada/run", tmp_path / "run")
    with pytest.raises(AdapterError, match=r"the newest is hf://ada/run/checkpoint-7$"):
        load_adapter("ada/run")
    assert load_adapter("hf://ada/run/checkpoint-7").trained


def test_a_checkpoint_of_relora_is_refused(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "checkpoint-20", lambda name: name)
    (folder / "relora").mkdir()
    (folder / "relora" / "model.safetensors").write_bytes(b"")
    shutil.copytree(scene / "peft", folder / "adapter")
    for path in (folder, folder / "adapter"):
        with pytest.raises(AdapterError, match="checkpoint of ReLoRA"):
            load_adapter(path)


def test_weights_in_shards_say_how_to_put_them_together(scene: Path, tmp_path: Path) -> None:
    folder = rewritten(scene, tmp_path / "run", lambda name: name)
    (folder / FILE).unlink()
    (folder / "adapter_model.safetensors.index.json").write_text("{}")
    with pytest.raises(AdapterError, match="has no weight_map of tensor to file"):
        load_adapter(folder)
    (folder / "adapter_model.safetensors.index.json").unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(AdapterError, match="accelerate merge-weights"):
        load_adapter(folder)


def test_reward_models_of_trl_have_their_head_merged(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_base(tmp_path / "base")
    trained = make_adapter(
        tmp_path / "reward", base, kind=LoraConfig, target_modules=QV, modules_to_save=["score"], task_type="SEQ_CLS",
        model_class=AutoModelForSequenceClassification,
    )  # fmt: skip
    merge(tmp_path / "reward", tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").double().eval()
    ids = torch.arange(2, 20)[None]
    model.config.pad_token_id = trained.config.pad_token_id = 0
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, trained.double()(ids).logits, atol=1e-6)
