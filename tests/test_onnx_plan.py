"""The plan of an ONNX export: what `--dry-run` shows, that it writes nothing, and the tables that choices come from."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import make_adapter, make_base
from graphs import answers, make_case, make_graph, run
from loopback import LoopbackHub
from peft import PeftModel
from progress_tools import steps_of
from transformers import AutoModelForCausalLM

from fossil_export import (
    FossilExportError,
    OnnxPlan,
    Progress,
    convert,
    export_onnx,
    load_adapter,
    merge,
    plan_onnx,
    run_onnx,
)
from fossil_export.cli import main
from fossil_export.merging._planning import with_dtype
from fossil_export.onnx.builders import BUILDERS, PRECISIONS, Builder, PrecisionName, RuntimeName, default_builder
from fossil_export.onnx.modes import MODES, Mode, ModeName


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["onnx", *map(str, arguments)])


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def option(name: str) -> click.Option:
    found = next(one for one in main.commands["onnx"].params if one.name == name)
    assert isinstance(found, click.Option)
    return found


def test_literal_types_and_choices_are_the_tables() -> None:
    for kind, table, name in ((ModeName, MODES, "mode"), (RuntimeName, BUILDERS, "runtime"),
                              (PrecisionName, PRECISIONS, "precision")):  # fmt: skip
        assert get_args(kind) == tuple(table)
        choices = option(name).type
        assert isinstance(choices, click.Choice) and list(choices.choices) == list(table)
    for function in (export_onnx, plan_onnx):
        written = signature(function).parameters
        annotations = [written[name].annotation for name in ("mode", "runtime", "precision")]
        assert annotations == ["ModeName", "RuntimeName | None", "PrecisionName | None"]


def test_every_mode_and_builder_has_its_file_and_its_line_of_help() -> None:
    for name, mode in MODES.items():
        file = import_module(f"fossil_export.onnx.modes._{name}")
        assert mode.name == name and callable(file.rewrite)
        assert callable(getattr(file, "makes_weights", None)) == mode.new_weights
        assert f"{name}: {mode.help}" in str(option("mode").help)
    for name, builder in BUILDERS.items():
        assert builder.name == name and callable(import_module(f"fossil_export.onnx.builders._{name}").build)
        assert f"{name}: {builder.help}" in str(option("runtime").help)


def test_who_makes_a_graph_by_default() -> None:
    assert default_builder(["LlamaForCausalLM"]).name == "genai"
    assert default_builder(["BertForSequenceClassification"]).name == "torch" == default_builder([]).name


def test_another_mode_and_builder_are_a_file_and_an_entry_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    (case.base / "config.json").write_text('{"architectures": ["Layers"]}')
    seen: list[tuple[str, str]] = []

    def build(model: Path, output: Path, precision: str, device: str) -> Path:
        seen.append((precision, device))
        return make_graph(case, output / "model.onnx", external=False)

    for table, entry, functions in (
        (MODES, Mode("plain", "nothing is added", 1), {"rewrite": lambda graph, editor: ()}),
        (BUILDERS, Builder("handmade", "a test", "layers", lambda names: "Layers" in names), {"build": build}),
    ):
        name = f"{type(entry).__module__}._{entry.name}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
        monkeypatch.setitem(table, entry.name, entry)
    x = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
    for mode, want in (("plain", case.plain), ("fused", case.trained)):
        result = export_onnx(case.adapter, tmp_path / mode, base=case.base, mode=mode, runtime="handmade", device="cpu")
        assert (result.mode, result.runtime, result.targets) == (mode, "handmade", 6)
        np.testing.assert_allclose(run(result.graph, x), answers(want, x), rtol=1e-4, atol=1e-5)
    assert seen == [("fp32", "cpu")] * 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom fossil_export.cli import main\n"
        "for words in (['--help'], ['onnx', '--help']):\n    assert CliRunner().invoke(main, words).exit_code == 0\n"
        "print([name for name in ('numpy', 'onnx', 'onnx_ir', 'torch', 'safetensors') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_graph_that_is_there_shows_its_places_and_nothing_is_written(tmp_path: Path) -> None:
    case = make_case(tmp_path, rank=5)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    (graph.parent / "genai_config.json").write_text("{}")
    before = files(tmp_path)
    command = [case.adapter, "--base", case.base, "--onnx", graph, "--mode", "tiled", "--dry-run"]
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.output
    table, _, summary = shown.output.partition("\n\n")
    assert "layers.{0–1}.qkv_proj" in table and "q_proj, k_proj, v_proj" in table and "32x24" in table
    assert f"tiled: {MODES['tiled'].help}" in summary and str(graph) in summary and "genai_config.json" in summary
    every = invoke(*command, "--all").output
    assert "layers.1.qkv_proj" in every and "{0–1}" not in every
    plan = json.loads(invoke(*command, "--json").stdout)
    assert (plan["mode"], plan["runtime"], plan["graph"]) == ("tiled", "onnx", str(graph))
    assert plan["companions"] == ["genai_config.json"] and len(plan["modules"]) == 6
    place = plan["places"][1]
    assert (place["label"], place["outputs"], place["inputs"], place["dtype"]) == ("layers.1.qkv_proj", 32, 24, "FLOAT")
    assert [(piece["module"], piece["at"], piece["count"]) for piece in place["pieces"]] == [
        ("layers.1.q_proj", 0, 16), ("layers.1.k_proj", 16, 8), ("layers.1.v_proj", 24, 8)
    ]  # fmt: skip
    assert files(tmp_path) == before


def test_a_graph_to_be_made_shows_who_makes_it_and_its_modules(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = files(tmp_path)
    shown = invoke(tmp_path / "adapter", "--mode", "swappable", "--precision", "fp16", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "model.layers.{0–1}.self_attn.q_proj" in shown.output
    assert "to be made by genai from the base, fp16, for cpu" in shown.output
    assert "lm_head.weight were trained whole" in shown.output
    plan = plan_onnx(tmp_path / "adapter", runtime="torch")
    assert plan.places is None and (plan.runtime, plan.precision, plan.graph) == ("torch", "fp32", None)
    assert "config.json" in plan.companions and plan.nbytes >= 4 * 120 * 48
    assert json.loads(json.dumps(plan.to_dict()))["whole_tensors"] == ["lm_head.weight"]
    assert "from the merged model, fp32" in invoke(tmp_path / "adapter", "--dry-run").output
    assert files(tmp_path) == before


@pytest.mark.parametrize("mode", list(MODES))
def test_a_plan_that_is_run_writes_what_the_export_writes(mode: ModeName, tmp_path: Path) -> None:
    case = make_case(tmp_path, rank=5)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    plan = plan_onnx(case.adapter, case.base, mode=mode, onnx=graph)
    assert isinstance(plan, OnnxPlan) and plan.places is not None and len(plan.places) == 2
    told: list[Progress] = []
    planned = run_onnx(plan, tmp_path / "planned", progress=told.append)
    exported = export_onnx(case.adapter, tmp_path / "exported", base=case.base, mode=mode, onnx=graph)
    assert planned.targets == exported.targets == len(plan.places) and "placing the shards" in steps_of(told)
    names = sorted(path.name for path in planned.output.iterdir())
    assert names == sorted(path.name for path in exported.output.iterdir())
    assert all((planned.output / name).read_bytes() == (exported.output / name).read_bytes() for name in names)
    for shown in (repr(plan), repr(planned)):
        assert mode in shown and "\n" not in shown and len(shown) < 400


def test_the_size_is_of_what_is_written(tmp_path: Path) -> None:
    """Data that is shared is not counted; what beside codes makes no weights anew shares it in fused mode too."""
    case = make_case(tmp_path, inputs=96, outputs={"q_proj": 640, "k_proj": 64, "v_proj": 64})
    trained = 4 * load_adapter(case.adapter).parameters
    for form, mode, shares in (
        ("matmul", "tiled", True), ("matmul", "fused", False), ("nbits", "fused", True)
    ):  # fmt: skip
        graph = make_graph(case, tmp_path / form / "model.onnx", form)
        sizes = [path.stat().st_size for path in (graph, graph.with_name("model.onnx.data"))]
        plan = plan_onnx(case.adapter, case.base, mode=mode, onnx=graph)
        assert plan.nbytes == trained + (sizes[0] if shares else sum(sizes)), (form, mode)
        copied = plan_onnx(case.adapter, case.base, mode=mode, onnx=graph, copy_data=True)
        assert copied.nbytes == trained + sum(sizes)


def test_another_graph_than_the_planned_one_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "packed")
    plan = plan_onnx(case.adapter, case.base, mode="fused", onnx=graph)
    make_graph(case, graph, "matmul")
    with pytest.raises(FossilExportError, match=r"model\.onnx(\.data)?: changed while it was being read"):
        run_onnx(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["quantized", "another", "library", "runtime"])
def test_what_stops_the_export_stops_the_plan(wrong: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, inputs=32)
    graph = make_graph(case, tmp_path / "plain" / "model.onnx", "nbits" if wrong == "quantized" else "matmul")
    if wrong == "another":
        case = make_case(tmp_path, inputs=40)
    if wrong == "library":
        (graph.parent / "genai_config.json").write_text('{"custom_ops_library": "planted.so"}')
    options = ["--runtime", "torch"] if wrong == "runtime" else []
    command = [case.adapter, "--base", case.base, "--onnx", graph, "--mode", "tiled", *options]
    planned, exported = invoke(*command, "--dry-run"), invoke(*command, "--output", tmp_path / "out")
    assert planned.exit_code == exported.exit_code == 1 and planned.output == exported.output != ""


def test_without_an_output_and_without_dry_run() -> None:
    shown = invoke("adapter")
    assert (
        shown.exit_code == 2
        and "Missing option '--output' (or ask for the plan alone with '--dry-run')" in shown.output
    )


def test_a_base_on_the_hub_keeps_its_name_and_stays_there(hosted: LoopbackHub, tmp_path: Path) -> None:
    """For a graph that is to be made only headers are read; the second plan has the first's name."""
    plan = plan_onnx("ada/adapter", runtime="torch", precision="fp16")
    assert plan.merge.base_name == "ada/base" and not list((tmp_path / "home").rglob("*.safetensors"))
    again = with_dtype(plan.merge, "float16")
    assert (again.base_name, again.base_revision) == ("ada/base", plan.merge.base_revision)
    assert again.dtype == "float16" and all(tensor.dtype == "F16" for tensor in again.tensors)


def test_a_graph_of_a_base_on_the_hub_is_placed_once_that_is_here(hub: LoopbackHub, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = make_graph(case, tmp_path / "model.onnx")
    hub.add_folder("ada/base", case.base)
    command = [case.adapter, "--base", "ada/base", "--onnx", graph, "--mode", "fused"]
    shown = invoke(*command, "--dry-run").output
    assert "layers.{0–1}.q_proj.weight" in shown and "found when the base is here" in shown
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    made = invoke(*command, "--output", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert "6 weights of the graph" in invoke(*command, "--dry-run").output


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("mode", ["merged", "fused"])
def test_a_head_that_is_still_the_embedding_stays_tied(mode: ModeName, moved: bool, tmp_path: Path) -> None:
    """Only values tell, so no plan of headers does; the record of the graph has what a merge's has."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "miss_block" in name or (moved and "lm_head" in name and parameter.requires_grad):
                parameter.data = parameter.data + 0.1

    base = make_base(tmp_path / "base", tie=True)
    make_adapter(tmp_path / "adapter", base, change, target_modules=["q_proj"], modules_to_save=["lm_head"])
    result = export_onnx(tmp_path / "adapter", tmp_path / "out", mode=mode, runtime="torch")
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    records = [json.loads((folder / "fossil_export.json").read_text()) for folder in (result.output, merged.output)]
    assert records[0]["config_edits"] == records[1]["config_edits"] == ({"tie_word_embeddings": False} if moved else {})
    assert [entry["tensor"] for entry in records[0]["tensors"]] == [entry["tensor"] for entry in records[1]["tensors"]]
    tokens = np.arange(6)[None]
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        want = trained(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(run(result.graph, tokens, feeds=feeds)[0], want, rtol=1e-3, atol=1e-4)


def test_an_adapter_file_of_such_a_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie=True)

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.data += 0.1 * ("miss_block" in name)

    make_adapter(tmp_path / "adapter", base, change, target_modules=["q_proj"], modules_to_save=["lm_head"])
    result = export_onnx(tmp_path / "adapter", tmp_path / "out", mode="swappable", runtime="torch")
    made = convert(tmp_path / "adapter", tmp_path / "one.onnx_adapter", to="onnx-adapter", graph=result.output)
    assert result.adapter_file is not None and made.output.read_bytes() == result.adapter_file.read_bytes()
