"""Adapters that cannot be merged: one line that names the file, the tensor and the remedy, nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, weights
from refusal_tools import CONFIG, QPROJ, WEIGHTS, refused, run
from safetensors.torch import save_file


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = weights(folder)
    change(state)
    save_file(state, folder / WEIGHTS)


def rename(state: dict[str, torch.Tensor], old: str, new: str) -> None:
    state[new] = state.pop(old)


class Code:
    """Runs when unpickled by a careless loader."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/fossil-export-was-run",)


def pickled_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"evil": Code()}, folder / "adapter_model.bin")


def pickled_list(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save([1, 2], folder / "adapter_model.bin")


def cut_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04 cut")


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty folder": (lambda a: [file.unlink() for file in a.iterdir()], [CONFIG, "missing"]),
    "config missing": (lambda a: (a / CONFIG).unlink(), [CONFIG, "missing"]),
    "config not JSON": (lambda a: (a / CONFIG).write_text("{r: 8"), [CONFIG, "not valid JSON"]),
    "config a list": (lambda a: (a / CONFIG).write_text("[]"), [CONFIG, "not a JSON object"]),
    "config unreadable bytes": (lambda a: (a / CONFIG).write_bytes(b"\xff\xfe{"), [CONFIG]),
    "another method": (lambda a: edit_json(a / CONFIG, peft_type="IDEFICS"), [CONFIG, "'IDEFICS'", "MISS, BONE, LORA"]),
    "r not a number": (lambda a: edit_json(a / CONFIG, r="8"), [CONFIG, "r is '8'"]),
    "init_weights unknown": (lambda a: edit_json(a / CONFIG, init_weights="odd"), [CONFIG, "'odd'"]),
    "field unknown": (lambda a: edit_json(a / CONFIG, use_dora=True), [CONFIG, "use_dora"]),
    "rank denied": (lambda a: edit_json(a / CONFIG, r=4), [WEIGHTS, QPROJ[-5:], "rank 8", "r=4"]),
    "mini denied": (lambda a: edit_json(a / CONFIG, init_weights="mini", mini_r=5), [WEIGHTS, "mini_r=5"]),
    "bat denied": (lambda a: edit_json(a / CONFIG, init_weights="bat"), [WEIGHTS, "2-dimensional", "'bat'"]),
    "3-D in tile": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(6, 8, 8)})),
        [WEIGHTS, QPROJ, "3-dimensional"],
    ),
    "1-D": (lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8)})), [QPROJ, "1 dimensions"]),
    "empty shard": (lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(0, 48)})), [QPROJ, "ZeRO-3"]),
    "integer shard": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8, 48, dtype=torch.int32)})),
        [QPROJ, "I32"],
    ),
    "integer shard beside a saved module": (
        lambda a: [
            edit_json(a / CONFIG, modules_to_save=["lm_head"]),
            edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8, 48, dtype=torch.int32)})),
        ],
        [QPROJ, "I32"],
    ),
    "blocks of bat beside tiles": (
        lambda a: [
            edit_json(a / CONFIG, peft_type="BONE"),
            edit_weights(a, lambda s: [rename(s, name, name.replace("miss_", "bone_")) for name in list(s)]),
            edit_weights(a, lambda s: s.update({QPROJ.replace("miss_", "bone_"): torch.zeros(6, 8, 8)})),
        ],
        [WEIGHTS, "mixes bat and tile shards"],
    ),
    "target denied": (lambda a: edit_json(a / CONFIG, target_modules=["v_proj"]), [CONFIG, "down_proj"]),
    "target pattern": (lambda a: edit_json(a / CONFIG, target_modules=".*v_proj"), [CONFIG, "down_proj"]),
    "target pattern broken": (lambda a: edit_json(a / CONFIG, target_modules="("), [CONFIG, "regular expression"]),
    "unknown tensor": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.norm.scale": torch.zeros(2)})),
        [WEIGHTS, "model.norm.scale"],
    ),
    "prompt embeddings": (
        lambda a: edit_weights(a, lambda s: s.update({"prompt_embeddings": torch.zeros(2)})),
        [WEIGHTS, "prompt_embeddings"],
    ),
    "saved tensor without a place": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.extra.weight": torch.zeros(2)})),
        ["model.extra.weight", "no counterpart", "LlamaForCausalLM"],
    ),
    "saved tensor of another shape": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.model.norm.weight": torch.zeros(2)})),
        ["model.norm.weight", "[2]", "[48]"],
    ),
    "saved twice": (
        lambda a: edit_weights(
            a,
            lambda s: s.update(
                {f"base_model.model.lm_head.{name}": torch.zeros(120, 48) for name in ("weight", "base_layer.weight")}
            ),
        ),
        ["lm_head.weight twice"],
    ),
    "saved tensor empty": (
        lambda a: edit_weights(a, lambda s: s.update({"base_model.model.lm_head.weight": torch.zeros(0)})),
        ["lm_head.weight", "ZeRO-3"],
    ),
    "saved tensor NaN": (
        lambda a: edit_weights(
            a, lambda s: s.update({"base_model.model.lm_head.weight": torch.full((120, 48), float("nan"))})
        ),
        ["lm_head.weight", "NaN", "diverged"],
    ),
    "odd config values": (lambda a: edit_json(a / CONFIG, peft_type=[]), [CONFIG, "peft_type"]),
    "odd modules_to_save": (lambda a: edit_json(a / CONFIG, modules_to_save=True), [CONFIG, "modules_to_save"]),
    "odd auto_mapping": (lambda a: edit_json(a / CONFIG, auto_mapping="BertModel"), [CONFIG, "auto_mapping"]),
    "odd base name": (lambda a: edit_json(a / CONFIG, base_model_name_or_path=5), [CONFIG, "base_model_name_or_path"]),
    "huge pattern": (lambda a: edit_json(a / CONFIG, target_modules="a{99999999999999999}"), [CONFIG, "expression"]),
    "no shards": (lambda a: edit_weights(a, lambda s: s.clear()), [WEIGHTS, "no shards"]),
    "another model's shapes": (
        lambda a: edit_weights(a, lambda s: s.update({QPROJ: torch.zeros(8, 64)})),
        [QPROJ, "64 outputs", "--base"],
    ),
    "modules the base lacks": (
        lambda a: edit_weights(a, lambda s: rename(s, QPROJ, QPROJ.replace("layers.0", "layers.7"))),
        ["model.layers.7.self_attn.q_proj", "--base"],
    ),
    "a shard for a vector": (
        lambda a: [
            edit_json(a / CONFIG, target_modules=r".*(norm|_proj)"),
            edit_weights(a, lambda s: rename(s, QPROJ, "base_model.model.model.norm.miss_block")),
        ],
        ["model.norm", "no matrix"],
    ),
    "targets that are no names": (
        lambda a: edit_json(a / "adapter_config.json", target_modules=["q_proj", "v_proj", 3]),
        ["target_modules", "3"],
    ),
    "modules_to_save that are no names": (
        lambda a: edit_json(a / "adapter_config.json", modules_to_save=["lm_head", 0.5]),
        ["modules_to_save", "0.5"],
    ),
    "NaN": (lambda a: edit_weights(a, lambda s: s[QPROJ].fill_(float("nan"))), [QPROJ, "NaN"]),
    "infinity": (lambda a: edit_weights(a, lambda s: s[QPROJ].fill_(float("inf"))), [QPROJ, "infinite"]),
    "cut": (lambda a: os.truncate(a / WEIGHTS, 2000), [WEIGHTS, "cut or corrupt"]),
    "no bytes": (lambda a: (a / WEIGHTS).write_bytes(b""), [WEIGHTS, "too few"]),
    "weights missing": (lambda a: (a / WEIGHTS).unlink(), [str(Path(WEIGHTS))]),
    "pickle with code": (pickled_code, ["adapter_model.bin", "may hold code", "safetensors"]),
    "pickle of a list": (pickled_list, ["adapter_model.bin", "not a state dict"]),
    "pickle cut": (cut_pickle, ["adapter_model.bin"]),
    "base not named": (
        lambda a: edit_json(a / CONFIG, base_model_name_or_path=None),
        ["does not name its base", "--base"],
    ),
    "base elsewhere": (
        lambda a: edit_json(a / CONFIG, base_model_name_or_path="some/where"),
        ["some/where", "no such file", "--base"],
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapter(name: str, adapter: Path, tmp_path: Path) -> None:
    damage, mentions = BAD_ADAPTERS[name]
    damage(adapter)
    refused(run("merge", adapter, "--output", tmp_path / "merged"), *mentions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert not Path("/tmp/fossil-export-was-run").exists()
