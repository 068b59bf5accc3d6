"""A converted LoRA is verified; what cannot be converted is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, make_base, weights
from safetensors.torch import load_file, save_file

from fossil_export import FossilExportError, convert, verify
from fossil_export.cli import main


class TestVerifyingLora:
    @pytest.fixture
    def lora(self, adapter: Path, tmp_path: Path) -> Path:
        return convert(adapter, tmp_path / "lora", to="lora").output

    def damaged(self, lora: Path, change: Any, match: str, level: str = "all") -> None:
        file = lora / "adapter_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)
        found = verify(lora, level=level)
        assert not found.parity and match in found.problems[0], found.problems

    def test_what_it_catches(self, lora: Path) -> None:
        stem = "base_model.model.model.layers.0.mlp.up_proj"

        def off(state: dict[str, torch.Tensor]) -> None:
            state[f"{stem}.lora_B.weight"][3, 2] += 1

        self.damaged(lora, off, "layers.0.mlp.up_proj: its lora_B is not the trained shard", "weights")

        def rolled(state: dict[str, torch.Tensor]) -> None:
            off(state)
            state[f"{stem}.lora_A.weight"] = state[f"{stem}.lora_A.weight"].roll(1, 1)

        self.damaged(lora, rolled, "layers.0.mlp.up_proj: its lora_A does not sum")

    def test_scaling(self, lora: Path) -> None:
        edit_json(lora / "adapter_config.json", lora_alpha=16)
        found = verify(lora)
        assert "would be scaled" in found.problems[0]
        assert any("the logits of" in problem and "first at module" in problem for problem in found.problems)


def test_refusals_and_output(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match="target is 'dora', expected lora, gguf-lora"):
        convert(adapter, tmp_path / "x", to="dora")
    with pytest.raises(FossilExportError, match="exactly; leave --rank and --energy out"):
        convert(adapter, tmp_path / "x", to="lora", rank=8)
    with pytest.raises(FossilExportError, match="does not name its base"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
        convert(adapter, tmp_path / "x", to="lora")
    other = make_base(tmp_path / "other")
    (other / "config.json").unlink()
    state = {name: value for name, value in weights(other).items() if "layers.1" not in name}
    for file in other.glob("*.safetensors*"):
        file.unlink()
    save_file(state, other / "model.safetensors")
    with pytest.raises(FossilExportError, match=r"has no weights for model\.layers\.1"):
        convert(adapter, tmp_path / "x", to="lora", base=other)
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    next(iter(state.values()))[0, 0] = float("inf")
    save_file(state, file)
    for target in ("lora", "miss"):
        with pytest.raises(FossilExportError, match="infinite or NaN"):
            convert(adapter, tmp_path / "x", to=target, base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_command_line(adapter: Path, tmp_path: Path) -> None:
    command = ["convert", str(adapter), "--to", "lora", "-o", str(tmp_path / "lora")]
    done = CliRunner().invoke(main, [*command, "--json"])
    record = json.loads(done.stdout)
    assert done.exit_code == 0 and record["rank"] == 8 and record["exact"] is True
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 0
    assert "exact    yes\n" in CliRunner().invoke(main, [*command, "--overwrite"]).stdout
