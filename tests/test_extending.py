"""What docs/extending.md promises: methods and converters from elsewhere, by one object and one entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edit_json, make_base, weights
from graphs import make_case, make_graph, run
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, export_onnx, inspect, load_adapter, merge, verify
from fossil_export.adapters import Adapter
from fossil_export.checkpoints import TensorInfo
from fossil_export.converting import CONVERTERS, Converter
from fossil_export.errors import AdapterError
from fossil_export.methods import METHODS, POSITIVE, Arrays, Base, Field, LowRank, Numbers, Shapes
from fossil_export.onnx.modes import MODES
from fossil_export.verifying.reference import EXACT

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 96)}
RANK, SCALE = 3, 0.5


class Toy(Base):
    """W' = W + s · P Q, with P (out, r) and Q (r, in): two tensors and a number, as LoRA has them."""

    def __init__(self) -> None:
        self.PEFT = {"TOY": {"toy.p": "P", "toy.q": "Q"}}
        self.FIELDS = {
            "r": POSITIVE,
            "toy_scale": Field("a number", lambda value: isinstance(value, (int, float)), 1.0),
        }

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        if shapes.keys() != {"P", "Q"}:
            raise AdapterError(f"{where}: one half is missing; save the adapter again")
        if not shapes["P"][1] == shapes["Q"][0] == config["r"]:
            raise AdapterError(f"{where} and r={config['r']} of the config do not go together; save the adapter again")
        return {"r": config["r"], "scale": config.get("toy_scale", self.FIELDS["toy_scale"].default)}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        found = (shapes["P"][0], shapes["Q"][1])
        return None if found == weight else f"it is made for {found}, not {weight}"

    def part(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {"P": arrays["P"][start:stop], "Q": arrays["Q"][:]}

    def update(self, weight: Any, arrays: Arrays, numbers: Numbers, start: int) -> Any:
        return arrays["P"][start : start + len(weight)] @ arrays["Q"] * numbers["scale"]

    def form_rank(self, shapes: Shapes) -> int | None:
        return shapes["Q"][0]

    def low_rank(self, arrays: Arrays, numbers: Numbers, outputs: int) -> LowRank | None:
        return LowRank(arrays["P"] * numbers["scale"], arrays["Q"])


class ExactToy:
    """The same in float64, for `verify`."""

    def unit(self, tensors: Mapping[str, TensorInfo]) -> int:
        return 1

    def part(self, arrays: Mapping[str, Any], start: int, stop: int) -> Mapping[str, Any]:
        return {"P": arrays["P"][start:stop], "Q": arrays["Q"][:]}

    def rebuild(self, weight: Any, part: Mapping[str, Any], numbers: Mapping[str, float], exact: Any) -> Any:
        exact[:] = weight + numbers["scale"] * np.einsum("or,ri->oi", part["P"], part["Q"])
        terms = len(part["Q"]) + 2
        return terms * 2.0**-24 * abs(numbers["scale"]) * (np.abs(part["P"]) @ np.abs(part["Q"]))

    def up(self, part: Mapping[str, Any], numbers: Mapping[str, float]) -> Any:
        return part["P"] * part["P"].dtype.type(numbers["scale"])

    def down(self, arrays: Mapping[str, Any], numbers: Mapping[str, float], inputs: int) -> Any:
        return arrays["Q"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of that method, on a base beside it, with the method in the tables."""
    monkeypatch.setitem(METHODS, "toy", Toy())
    monkeypatch.setitem(EXACT, "toy", ExactToy())
    base = make_base(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (outputs, inputs) in MODULES.items():
        tensors[f"base_model.model.{module}.toy.p"] = torch.randn(outputs, RANK, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.toy.q"] = torch.randn(RANK, inputs, generator=generator) * 0.1
    return write_toy(tmp_path / "toy", tensors, base)


def write_toy(folder: Path, tensors: Mapping[str, torch.Tensor], base: Path) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    config = {"peft_type": "TOY", "r": RANK, "toy_scale": SCALE, "base_model_name_or_path": str(base)}
    config["target_modules"] = "all-linear"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    return {m: SCALE * tensors[f"{prefix}{m}.toy.p"] @ tensors[f"{prefix}{m}.toy.q"] for m in MODULES}


def test_a_method_from_elsewhere_merges_and_is_verified(toy: Path, tmp_path: Path) -> None:
    seen = inspect(toy)
    assert seen.problems == () and (seen.adapter.variant, seen.adapter.rank) == ("toy", RANK)
    assert [entry["shard"] for entry in seen.to_dict()["modules"]][:2] == [
        "base_model.model.model.layers.0.self_attn.q_proj.toy.p",
        "base_model.model.model.layers.0.self_attn.q_proj.toy.q",
    ]
    result = merge(toy, tmp_path / "merged")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    for module, update in updates(toy).items():
        torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + update)
        assert result.survival[f"{module}.weight"].survived == pytest.approx(1.0, abs=1e-5)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(MODULES)
    found = verify(tmp_path / "merged")
    assert found.parity and found.forward is not None and found.forward.artifact.relative_error < 1e-5
    name = "model.layers.1.mlp.down_proj.weight"
    file = next(path for path in (tmp_path / "merged").glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name][2, 3] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    (problem,) = verify(tmp_path / "merged", level="weights").problems
    assert "down_proj.weight 1 of 4608 elements are off, the first at [2, 3]" in problem


def test_its_lora_is_the_update(toy: Path, tmp_path: Path) -> None:
    result = convert(toy, tmp_path / "lora", to="lora")
    assert result.details["exact"] and result.details["rank"] == RANK
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for module, update in updates(toy).items():
        name = f"base_model.model.{module}"
        torch.testing.assert_close(tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"], update)
    assert verify(tmp_path / "lora", level="weights").parity


def test_it_has_no_form_in_miss(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match="is a toy adapter, of which PEFT's MISS has no form"):
        convert(toy, tmp_path / "miss", to="miss")
    assert not (tmp_path / "miss").exists()


def test_what_it_does_not_understand_stops_the_reading(toy: Path) -> None:
    edit_json(toy / "adapter_config.json", toy_scale="big")
    with pytest.raises(FossilExportError, match="toy_scale is 'big', expected a number"):
        load_adapter(toy)
    edit_json(toy / "adapter_config.json", toy_scale=1.0, mini_r=4)
    with pytest.raises(FossilExportError, match="sets mini_r, which fossil-export does not understand"):
        load_adapter(toy)
    edit_json(toy / "adapter_config.json", mini_r=..., r=5)
    with pytest.raises(FossilExportError, match="and r=5 of the config do not go together"):
        load_adapter(toy)
    edit_json(toy / "adapter_config.json", r=RANK)
    tensors = load_file(toy / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.toy.q"]
    save_file(tensors, toy / "adapter_model.safetensors")
    with pytest.raises(FossilExportError, match=r"q_proj\.toy\.p \[48, 3\]: one half is missing"):
        load_adapter(toy)


def test_a_method_without_a_check_of_its_own_gets_no_verdict(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(toy, tmp_path / "merged")
    monkeypatch.delitem(EXACT, "toy")
    with pytest.raises(KeyError, match="toy"):
        verify(tmp_path / "merged", level="weights")


@pytest.mark.parametrize(("mode", "form"), [(mode, form) for mode in MODES for form in ("matmul", "packed")]
                         + [("tiled", "transpose"), ("fused", "gemm_transb"), ("fused", "packed_nbits")])  # fmt: skip
def test_its_graphs_give_what_was_trained(
    mode: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices beside the weight, in graphs made by hand; in a packed one each layer has matrices of its own."""
    monkeypatch.setitem(METHODS, "toy", Toy())
    case = make_case(tmp_path)
    flat = form.startswith("gemm")
    generator = torch.Generator().manual_seed(0)
    tensors, trained = {}, case.plain
    for name, layer in [(n, m) for n, m in trained.named_modules() if isinstance(m, torch.nn.Linear)]:
        if name.endswith("k_proj"):
            continue  # not trained
        up = torch.randn(layer.out_features, RANK, generator=generator) * 0.2
        down = torch.randn(RANK, layer.in_features, generator=generator) * 0.2
        tensors |= {f"base_model.model.{name}.toy.p": up, f"base_model.model.{name}.toy.q": down}
    graph = make_graph(case, tmp_path / "plain.onnx", form=form, flat=flat)
    x = np.random.default_rng(0).standard_normal((5, 24) if flat else (2, 3, 24)).astype(np.float32)
    before = run(graph, x)
    folder = write_toy(tmp_path / "toy", tensors, case.base)
    result = export_onnx(folder, tmp_path / "out", base=case.base, mode=mode, onnx=graph)
    found = run(result.graph, x, result.adapter_file)
    for name in {key.rpartition(".toy.")[0] for key in tensors}:
        layer = trained.get_submodule(name.removeprefix("base_model.model."))
        layer.weight.data += SCALE * tensors[f"{name}.toy.p"] @ tensors[f"{name}.toy.q"]
    with torch.no_grad():
        wanted = trained(torch.from_numpy(x)).numpy()
    if form.endswith("nbits"):  # the codes are off the base's weights whatever is trained
        (tmp_path / "again").mkdir()
        plain = make_case(tmp_path / "again").plain
        with torch.no_grad():
            wanted = before + wanted - plain(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(found - before).max() > 0.1


def sums(adapter: Adapter, path: Path, options: Any) -> dict[str, Any]:
    """The sum of each module's values, as text."""
    lines = [f"{m} {sum(float(a.sum()) for a in adapter.arrays(m).values()):.6g}" for m in adapter.trained]
    path.write_text("\n".join(lines))
    return {"modules": len(lines), "warnings": ["it is a toy"]}


def test_a_converter_from_elsewhere(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name: Any = "sums"
    made = Converter(name, "the sum of each module, as text", sums, folder=False, reads_base=False, magic=b"model.")
    monkeypatch.setitem(CONVERTERS, name, made)
    output = tmp_path / "sums.txt"
    result = convert(toy, output, to=name)
    assert result.to_dict()["modules"] == len(MODULES) and result.warnings == ("it is a toy",)
    assert [line.split()[0] for line in output.read_text().splitlines()] == list(MODULES)
    with pytest.raises(FossilExportError, match="exists already"):
        convert(toy, output, to=name)
    convert(toy, output, to=name, overwrite=True)
    with pytest.raises(FossilExportError, match=r"--to sums takes no --rank, which is for lora; leave it out"):
        convert(toy, tmp_path / "other.txt", to=name, rank=4)
    assert not (tmp_path / "other.txt").exists()
