"""What stops a conversion for a swappable graph: one clear line, and no file left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_tools
import pytest
from click.testing import CliRunner
from graphs import Case, make_case
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, export_onnx
from fossil_export.cli import main

case = onnx_tools.case
graph = onnx_tools.graph


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
