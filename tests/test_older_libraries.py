"""Libraries that are too old for what they are given would make another model without a word; they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import QV, edit_json, make_adapter, make_base

from fossil_export import export_onnx, merge, plan_onnx, verify
from fossil_export._foreign import read_config
from fossil_export.errors import CheckpointError, OnnxError


@pytest.fixture
def transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fossil_export._foreign.version", lambda package: "4.57.6")


def test_a_config_of_transformers_5_beside_transformers_4(tmp_path: Path, transformers_4: None) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=QV)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "merged", level="weights").parity
    why = r"merged/config.json: was written by transformers 5, and transformers 4\.57\.6 would pass over"
    with pytest.raises(CheckpointError, match=why):
        verify(tmp_path / "merged")
    for runtime in ("genai", "torch"):
        with pytest.raises(CheckpointError, match="pass over its rope_parameters: pip install 'transformers>=5'"):
            export_onnx(tmp_path / "adapter", tmp_path / "graph", runtime=runtime)
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_config_that_says_it_in_both_ways_is_read(part: str | None, tmp_path: Path, transformers_4: None) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["transformers_version"] = "4.57.0"
    own = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    (base / "config.json").write_text(json.dumps(config | (own if part is None else {part: own})))
    assert read_config(base).model_type == "llama"
    edit_json(base / "config.json", other_config={"rope_parameters": rope})
    with pytest.raises(CheckpointError, match="was written by transformers 5"):
        read_config(base)


def test_a_builder_that_passes_over_the_base_of_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GenAI 0.13 builds SmolLM2 with 10,000 for its 100,000, and the logits are 7 % off."""
    monkeypatch.setattr("fossil_export.onnx.builders._genai.version", lambda package: "0.13.2")
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), target_modules=QV)
    why = r"onnxruntime-genai-cuda 0\.13\.2 builds wrong graphs .*: pip install 'onnxruntime-genai-cuda>=0\.14'"
    with pytest.raises(OnnxError, match=why):
        export_onnx(tmp_path / "adapter", tmp_path / "graph", runtime="genai")
    assert not (tmp_path / "graph").exists()


def test_a_graph_of_a_config_that_is_newer_than_transformers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=QV)
    assert not plan_onnx(tmp_path / "adapter", runtime="torch").warnings
    edit_json(base / "config.json", transformers_version="5.2000.0")
    (line,) = plan_onnx(tmp_path / "adapter", runtime="torch").warnings
    assert "written by transformers 5.2000.0" in line and "pip install --upgrade transformers" in line
