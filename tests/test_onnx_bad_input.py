"""What stops an ONNX export or a conversion: one clear line, and no file or folder left behind."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from graphs import Case, make_case, make_graph
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, Progress, convert, export_onnx
from fossil_export.cli import main


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.fixture
def graph(case: Case, tmp_path: Path) -> Path:
    return make_graph(case, tmp_path / "plain" / "model.onnx")


def refused(match: str, case: Case, tmp_path: Path, **options: Any) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FossilExportError, match=match) as caught:
        export_onnx(case.adapter, tmp_path / "out", **{"base": case.base, **options})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("mode", ["fused", "swappable"])
def test_bat_is_no_branch(mode: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, variant="bat")
    graph = make_graph(case, tmp_path / "plain" / "model.onnx")
    refused(
        "bat adapter.*use --mode tiled or merged, or approximate it by a LoRA", case, tmp_path, mode=mode, onnx=graph
    )


def test_graph_of_another_model(case: Case, graph: Path, tmp_path: Path) -> None:
    other = {name: value + 0.05 for name, value in load_file(case.base / "model.safetensors").items()}
    save_file(other, case.base / "model.safetensors")
    refused("holds other weights than the base: the graph was made from another model", case, tmp_path, onnx=graph)


def test_graph_of_another_model_without_names(case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", names=False)
    other = {name: value + 0.05 for name, value in load_file(case.base / "model.safetensors").items()}
    save_file(other, case.base / "model.safetensors")
    refused("has no place for layers.0.k_proj.*no product in it", case, tmp_path, onnx=graph)


def test_module_that_could_be_two(case: Case, tmp_path: Path) -> None:
    layers = case.plain.layers
    layers[1].k_proj.weight.data = layers[0].k_proj.weight.data.clone()
    save_file({name: value.clone() for name, value in case.plain.state_dict().items()}, case.base / "model.safetensors")
    nameless = make_graph(case, tmp_path / "plain" / "model.onnx", names=False)
    refused("layers.0.k_proj could be n1 .*, n5 .*equal weights", case, tmp_path, onnx=nameless)
    named = make_graph(case, tmp_path / "named" / "model.onnx")
    assert export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="fused", onnx=named).targets == 6


@pytest.mark.parametrize("mode", ["tiled", "fused", "swappable"])
def test_graph_that_carries_an_adapter(case: Case, graph: Path, mode: str, tmp_path: Path) -> None:
    once = export_onnx(case.adapter, tmp_path / "once", base=case.base, mode=mode, onnx=graph)
    match = "carries an adapter already" + (".*convert --to onnx-adapter" if mode == "swappable" else "")
    refused(match, case, tmp_path, mode="fused", onnx=once.graph)


@pytest.mark.parametrize(("mode", "opset"), [("tiled", 12), ("fused", 11), ("swappable", 14)])
def test_old_opset(case: Case, mode: str, opset: int, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", opset=opset)
    refused(f"has opset {opset}, --mode {mode} needs 1[35]; raise it with", case, tmp_path, mode=mode, onnx=graph)


def test_external_data_missing_or_cut(case: Case, graph: Path, tmp_path: Path) -> None:
    data = graph.with_name("model.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    refused("has 100 bytes, the graph reads up to", case, tmp_path, onnx=graph)
    data.unlink()
    refused("external data model.onnx.data is missing", case, tmp_path, onnx=graph)


def damage(graph: Path, change: Callable[[Any], Any]) -> None:
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializePartialToString())


def _long_dims(model: Any) -> None:
    model.graph.initializer[0].dims.extend([16, 2] * 40)


def _other_length(model: Any) -> None:
    next(one for one in model.graph.initializer[0].external_data if one.key == "length").value = "16"


def _cycle(model: Any) -> None:
    del model.graph.node[0].input[:]
    model.graph.node[0].input.extend([model.graph.node[-1].output[0], "layers.0.q_proj.weight"])
    model.graph.node[-1].input[0] = model.graph.node[0].output[0]


def _bytes_in(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def _long_name(model: Any) -> None:
    next(one for one in model.graph.initializer[0].external_data if one.key == "location").value = "x" * 100_000


def _no_type(model: Any) -> None:
    model.graph.initializer[0].data_type = 0


def _data_in_an_attribute(model: Any) -> None:
    node = model.graph.node.add(op_type="Constant", output=["c"])
    tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.CopyFrom(model.graph.initializer[0])
    next(one for one in tensor.external_data if one.key == "location").value = "../secret"


def _no_output(model: Any) -> None:
    node = next(one for one in model.graph.node if "layers.0.q_proj.weight" in one.input)
    del node.output[:]
    model.graph.input[0].type.Clear()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_no_output, "layers.0.q_proj"),
        (_long_dims, "the constant layers.0.q_proj.weight .*; export the graph again"),
        (_other_length, "names 16 bytes from byte 0 on"),
        (_cycle, "nodes that wait for each other"),
        (_bytes_in, "layers.0.q_proj is multiplied by UINT8"),
        (_long_name, "external data x{300} is missing or no file"),
        (_no_type, "has no type"),
        (_data_in_an_attribute, "keeps its data outside its folder"),
    ],
)
def test_graphs_that_do_not_hold_what_they_say(
    change: Callable[[Any], Any], match: str, case: Case, graph: Path, tmp_path: Path
) -> None:
    damage(graph, change)
    refused(match, case, tmp_path, onnx=graph)


@pytest.mark.parametrize("change", ["block_size", "codes", "text"])
def test_quantized_products_whose_numbers_disagree_have_no_weight(change: str, case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", form="nbits", external=False)

    def disagree(model: Any) -> None:
        node = model.graph.node[0]
        block = next(one for one in node.attribute if one.name == "block_size")
        if change == "block_size":
            block.i = 17
        elif change == "text":
            block.type, block.s = onnx.AttributeProto.STRING, b"16"
        else:
            shape = model.graph.initializer[0].dims
            shape[0], shape[1] = shape[0] // 2, shape[1]
            model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[: shape[0] * shape[1] * shape[2]]

    damage(graph, disagree)
    refused("has no place for layers.0.q_proj", case, tmp_path, onnx=graph, mode="fused")


def test_nothing_is_said_beside_the_error(
    case: Case, graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by NumPy of values that are not finite, nor by onnx_ir's log, which pytest's handlers would catch."""
    monkeypatch.setattr(logging.root, "handlers", [])
    data = graph.with_name("model.onnx.data")
    whole = data.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.write_bytes(b"\xff" * len(whole))
        refused("holds other weights than the base", case, tmp_path, onnx=graph, mode="fused")
    data.write_bytes(whole)
    damage(graph, lambda model: model.graph.node[3].ClearField("attribute"))
    refused("checker", case, tmp_path, onnx=graph, mode="fused")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["at", "outputs", "dtype", "kind", "name"])
def test_signatures_that_changed_are_seen(name: str, case: Case, graph: Path, tmp_path: Path) -> None:
    """Also where no sum tells: those written before there was one."""
    result = export_onnx(case.adapter, tmp_path / "out", base=case.base, mode="swappable", onnx=graph)
    written = next(one.value for one in onnx.load(result.graph, load_external_data=False).metadata_props)
    for old in (False, True):
        record = json.loads(written)
        slot = record["signature"]["slots"][0]
        place = slot["pieces"][0] if name == "at" else slot
        place[name] = 8 if name in ("outputs", "at") else {"a": 1}
        if old:
            del record["sha256"]
        damage(result.graph, lambda model: setattr(model.metadata_props[0], "value", json.dumps(record)))  # noqa: B023
        with pytest.raises(FossilExportError, match=r"metadata is damaged|has no input .* metadata tells") as caught:
            convert(case.adapter, tmp_path / "a", to="onnx-adapter", graph=result.graph, base=case.base)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.onnx.data"])
def test_links_out_of_the_graphs_folder(name: str, case: Case, graph: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    if (graph.parent / name).exists():
        (graph.parent / name).rename(elsewhere)
    else:
        elsewhere.write_text("a secret of this machine")
    (graph.parent / name).symlink_to(elsewhere)
    refused(f"{name}: is a link to", case, tmp_path, onnx=graph, mode="tiled")


def test_a_base_that_changes_while_the_graph_is_made(case: Case, graph: Path, tmp_path: Path) -> None:
    def change(now: Progress) -> None:
        if now.step == "checking the graph":
            content = bytearray((case.base / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (tmp_path / "incoming").write_bytes(content)
            (tmp_path / "incoming").replace(case.base / "model.safetensors")

    refused("changed while it was being read", case, tmp_path, onnx=graph, mode="swappable", progress=change)


def test_no_graph(case: Case, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no graph, it is a sentence")
    refused("is no ONNX graph", case, tmp_path, onnx=tmp_path / "text.onnx")
    refused("no such file or folder", case, tmp_path, onnx=tmp_path / "nowhere.onnx")
    (tmp_path / "empty").mkdir()
    refused("holds no model.onnx", case, tmp_path, onnx=tmp_path / "empty")
    refused("has no config.json, from which a graph is made", case, tmp_path)


@pytest.mark.parametrize("mode", ["merged", "tiled"])
def test_quantized_weights_cannot_be_added_to(case: Case, mode: str, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "nbits")
    refused("are quantized, and shards cannot be added to codes", case, tmp_path, mode=mode, onnx=graph)


def test_options_that_contradict(case: Case, graph: Path, tmp_path: Path) -> None:
    refused("leave --runtime and --precision out", case, tmp_path, onnx=graph, precision="fp16")
    refused("int4 weights are codes", case, tmp_path, mode="tiled", precision="int4")
    refused("mode is 'melted', expected merged, tiled", case, tmp_path, mode="melted")
    refused("precision is 'fp8', expected", case, tmp_path, precision="fp8")
    refused("device is 'mps', expected cpu, cuda", case, tmp_path, device="mps")


def test_diverged_shards(case: Case, graph: Path, tmp_path: Path) -> None:
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    refused("infinite or NaN", case, tmp_path, mode="fused", onnx=graph)


def test_shard_too_large_for_float16(case: Case, tmp_path: Path) -> None:
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", dtype="float16")
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = 1e6
    save_file(tensors, file)
    for mode in ("merged", "fused"):
        refused("does not fit FLOAT16; use a wider --precision", case, tmp_path, mode=mode, onnx=graph)


@pytest.mark.parametrize(("package", "extra"), [("onnx_ir", "onnx"), ("onnx", "onnx")])
def test_missing_extra(
    case: Case, graph: Path, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(rf"needs {package.replace('_', '-')}: .*pip install 'fossil-export\[{extra}\]'", case, tmp_path, onnx=graph)


def test_trained_modules_the_graph_does_not_have(case: Case, graph: Path, tmp_path: Path) -> None:
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.q_proj.weight"] = torch.ones(16, 24)
    for key in [key for key in tensors if "layers.0.q_proj.miss" in key]:
        del tensors[key]
    save_file(tensors, file)
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["layers.0.q_proj"]
    (case.adapter / "adapter_config.json").write_text(json.dumps(config))
    refused("also trained layers.0.q_proj.weight whole, and the graph has the base's", case, tmp_path, onnx=graph)


def test_command_line_is_one_line(case: Case, graph: Path, tmp_path: Path) -> None:
    command = ["onnx", str(case.adapter), "--base", str(case.base), "--onnx", str(graph), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, "--mode", "swappable", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["targets"] == 6
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "exists already" in again.stderr and again.stderr.count("\n") == 1
    assert CliRunner().invoke(main, [*command, "--mode", "fused", "--overwrite"]).exit_code == 0


class TestConvert:
    @pytest.fixture
    def swappable(self, case: Case, graph: Path, tmp_path: Path) -> Path:
        return export_onnx(case.adapter, tmp_path / "swap", base=case.base, mode="swappable", onnx=graph).output

    def refused(self, match: str, case: Case, tmp_path: Path, **options: Any) -> None:
        output = options.pop("output", tmp_path / "made.onnx_adapter")
        with pytest.raises(FossilExportError, match=match):
            convert(case.adapter, output, to="onnx-adapter", **{"base": case.base, **options})
        assert not list(tmp_path.glob("*made*"))

    def test_needs_a_swappable_graph(self, case: Case, graph: Path, tmp_path: Path) -> None:
        self.refused("name the folder of a swappable export with --for", case, tmp_path)
        self.refused("was not made by fossil-export", case, tmp_path, graph=graph)
        fused = export_onnx(case.adapter, tmp_path / "fused", base=case.base, mode="fused", onnx=graph).graph
        self.refused("was made in --mode fused; export it with --mode swappable", case, tmp_path, graph=fused)

    def test_other_base(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        other = {name: value + 0.05 for name, value in load_file(case.base / "model.safetensors").items()}
        (tmp_path / "sibling").mkdir()
        save_file(other, tmp_path / "sibling" / "model.safetensors")
        self.refused("whose weights are not those of", case, tmp_path, graph=swappable, base=tmp_path / "sibling")

    def test_module_without_input(self, case: Case, graph: Path, tmp_path: Path) -> None:
        few = make_case(tmp_path, adapter="few", targets=["q_proj"])
        narrow = export_onnx(few.adapter, tmp_path / "narrow", base=case.base, mode="swappable", onnx=graph).output
        self.refused("the graph has no inputs for layers.0.k_proj", case, tmp_path, graph=narrow)

    def test_other_widths(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        (tmp_path / "wide").mkdir()
        wide = make_case(tmp_path / "wide", outputs={"q_proj": 20, "k_proj": 8, "v_proj": 8})
        self.refused("does not fit the graph's layer", wide, tmp_path, graph=swappable)

    def test_bat(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        bat = make_case(tmp_path, variant="bat", adapter="bat")
        self.refused("bat adapter", bat, tmp_path, graph=swappable)

    def test_output_that_cannot_be(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("x")
        self.refused("exists already", case, tmp_path, graph=swappable, output=tmp_path / "there")
        self.refused("its folder does not exist", case, tmp_path, graph=swappable, output=tmp_path / "no" / "made")

    def test_damaged_signature(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        model = onnx.load(swappable / "model.onnx", load_external_data=False)
        for text in ("{", '{"format": 1, "signature": {"slots": 3}}', "[]"):
            model.metadata_props[0].value = text
            onnx.save(model, swappable / "model.onnx")
            self.refused("metadata is damaged; export it again", case, tmp_path, graph=swappable)

    def test_command(self, case: Case, swappable: Path, tmp_path: Path) -> None:
        output = tmp_path / "new.onnx_adapter"
        command = ["convert", str(case.adapter), "--to", "onnx-adapter", "--for", str(swappable), "-o", str(output)]
        done = CliRunner().invoke(main, [*command, "--base", str(case.base), "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["tensors"] == 6
        assert output.read_bytes() == (swappable / "adapter.onnx_adapter").read_bytes()
