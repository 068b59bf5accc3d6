"""Bases whose quantization is not read: refused by its name, with what to do; their plain floats can be merged into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from quantized_bases import plain_model
from quantized_mxfp4 import stored_as, trained
from refusal_tools import refused, run
from safetensors.torch import load_file, save_file

from fossil_export import merge, verify
from fossil_export.checkpoints.quantized import FORMATS, Stored
from fossil_export.checkpoints.quantized._unread import METHODS, SIGNS
from fossil_export.errors import FossilExportError


def is_read(method: str) -> bool:
    """Whether a format has bases of this method, or says itself why it has not."""
    said = {"quant_method": method, "bits": 4}
    stored = Stored("", {}, {"quantization_config": said}, said, None)  # type: ignore[arg-type]
    return method in FORMATS or any(one.describes(stored) for one in FORMATS.values())


UNREAD = sorted(method for method in METHODS if not is_read(method))
LAYER = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, and adapters of q_proj ("of_codes") and of o_proj ("of_floats")."""
    work = tmp_path_factory.mktemp("unread")
    base = plain_model(work / "plain")
    for name, module in {"of_codes": "q_proj", "of_floats": "o_proj"}.items():
        trained(base, work / name, LoraConfig(r=4, target_modules=[module]))
    return work


def quantized(scene: Path, folder: Path, method: str | None, kind: str = "codes") -> Path:
    """A base with q_proj as integers and a scale, or as floats and a scale beside it, or without a weight."""
    tensors = load_file(scene / "plain" / "model.safetensors")
    for name in [name for name in tensors if "q_proj" in name]:
        if kind == "codes":
            tensors[name] = tensors[name].to(torch.int8)
        elif kind not in ("scaled", "plain"):
            del tensors[name]
        if kind != "plain":
            beside = {"codes": "other_scale", "scaled": "other_scale"}.get(kind, kind)
            tensors[f"{name.removesuffix('weight')}{beside}"] = torch.ones(8, dtype=torch.float16)
    if kind in SIGNS:
        tensors["model.whole"] = torch.ones(2, dtype=torch.int8)
    stored_as(folder, scene / "plain", tensors, {"quant_method": method, "bits": 4})
    if method is None:
        (folder / "config.json").write_bytes((scene / "plain" / "config.json").read_bytes())
    return folder


def says(adapter: Path, base: Path, work: Path, **options: str) -> str:
    with pytest.raises(FossilExportError) as caught:
        merge(adapter, work / "out", base=base, **options)
    assert not (work / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", UNREAD)
def test_codes_are_refused_by_the_name_of_their_method(method: str, scene: Path, tmp_path: Path) -> None:
    found = METHODS[method]
    text = says(scene / "of_codes", quantized(scene, tmp_path / "base", method), tmp_path)
    assert f"{LAYER}.q_proj.weight [256, 256] is stored as I8: the base is quantized with {found.name}" in text
    assert (found.how or "run the adapter beside it, with PEFT") in text
    assert "is another one than an adapter for this was trained on" in text


@pytest.mark.parametrize("method", UNREAD)
def test_plain_floats_beside_codes_are_merged_into_unless_they_may_be_quantized_too(
    method: str, scene: Path, tmp_path: Path
) -> None:
    base = quantized(scene, tmp_path / "base", method)
    if METHODS[method].hidden:
        text = says(scene / "of_floats", base, tmp_path)
        assert f"may be quantized when the model runs: the base is quantized with {METHODS[method].name}" in text
        return
    merge(scene / "of_floats", tmp_path / "out", base=base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{number}.self_attn.o_proj.weight" for number in (0, 1)}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert verify(tmp_path / "out", adapter=scene / "of_floats", base=base, level="weights").parity
    cast = says(scene / "of_floats", base, tmp_path / "cast", dtype="float32")
    assert f"dtype cannot be float32: the base is quantized with {METHODS[method].name}" in cast


def test_floats_with_a_scale_beside_them_are_refused(scene: Path, tmp_path: Path) -> None:
    base = quantized(scene, tmp_path / "base", "eetq", "scaled")
    assert "q_proj.weight [256, 256] has other_scale beside it: the base is quantized with EETQ" in says(
        scene / "of_codes", base, tmp_path
    )


@pytest.mark.parametrize("sign", sorted(name for name, method in SIGNS.items() if not is_read(method)))
def test_a_base_without_settings_is_known_by_its_tensors(sign: str, scene: Path, tmp_path: Path) -> None:
    base = quantized(scene, tmp_path / "base", None, sign)
    text = says(scene / "of_codes", base, tmp_path)
    assert f"the base is quantized with {METHODS[SIGNS[sign]].name}, which is not read here" in text


def test_an_unknown_method_is_named_and_nothing_is_added_to_its_weights(scene: Path, tmp_path: Path) -> None:
    base = quantized(scene, tmp_path / "base", "newest", "plain")
    text = says(scene / "of_codes", base, tmp_path)
    assert "may be quantized when the model runs: the base is quantized with the unknown method 'newest'" in text
    config = json.loads((base / "config.json").read_text())
    for settings, name in (({"quant_algo": "W4A8_AWQ"}, "NVIDIA ModelOpt (W4A8_AWQ)"), ({}, "does not name")):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        tensors = load_file(scene / "plain" / "model.safetensors")
        tensors[f"{LAYER}.q_proj.weight"] = tensors[f"{LAYER}.q_proj.weight"].to(torch.uint8)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        assert name in says(scene / "of_codes", base, tmp_path)


def test_whole_modules_do_not_take_the_place_of_codes(scene: Path, tmp_path: Path) -> None:
    """Nor of floats that have a scale; of plain ones they do."""
    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["q_proj"])
    adapter = trained(scene / "plain", tmp_path / "adapter", config)
    for kind, text in {
        "codes": "q_proj.weight is BF16, and model.layers.0.self_attn.q_proj.weight of {} is I8; the base is quantized "
        "with EETQ",
        "scaled": "cannot be model.layers.0.self_attn.q_proj.weight of {}, which has other_scale beside it: the base "
        "is quantized with EETQ",
        "codebooks": "cannot be model.layers.0.self_attn.q_proj.weight of {}, which has codebooks beside it: the base "
        "is quantized with EETQ",
    }.items():
        base = quantized(scene, tmp_path / kind, "eetq", kind)
        assert text.format(base) in says(adapter, base, tmp_path)
    base = quantized(scene, tmp_path / "plain", "eetq", "plain")
    merge(adapter, tmp_path / "out", base=base)
    assert verify(tmp_path / "out", adapter=adapter, base=base, level="weights").parity


def test_rows_of_tokens_do_not_go_into_codes(scene: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["o_proj"], trainable_token_indices=[3, 5])
    adapter = trained(scene / "plain", tmp_path / "adapter", config)
    base = quantized(scene, tmp_path / "base", "hqq", "plain")
    tensors = load_file(base / "model.safetensors")
    embedding = "model.embed_tokens"
    save_file(tensors | {f"{embedding}.scale": torch.ones(3)}, base / "model.safetensors", {"format": "pt"})
    assert f"{embedding}.weight has scale beside it: the base is quantized with HQQ" in says(adapter, base, tmp_path)
    tensors[f"{embedding}.weight"] = tensors[f"{embedding}.weight"].to(torch.int8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert f"{embedding}.weight is stored as I8: the base is quantized with HQQ" in says(adapter, base, tmp_path)


def test_pickled_codes_are_refused_by_name_too(scene: Path, tmp_path: Path) -> None:
    base = quantized(scene, tmp_path / "base", "hqq")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    text = says(scene / "of_codes", base, tmp_path)
    assert "q_proj.weight" in text and "the base is quantized with HQQ" in text


def test_the_command_says_it_in_one_line(scene: Path, tmp_path: Path) -> None:
    base = quantized(scene, tmp_path / "base", "hqq")
    result = run("merge", scene / "of_codes", "-o", tmp_path / "out", "--base", base)
    refused(result, "the base is quantized with HQQ", "HQQLinear.dequantize()")
