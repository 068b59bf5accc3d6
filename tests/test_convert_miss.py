"""Conversion of older files to today's MISS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, make_adapter, weights
from convert_tools import logits
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, convert, load_adapter
from fossil_export.verifying._layers import attach
from fossil_export.verifying._sum import Sum


class TestMiss:
    @pytest.mark.parametrize("variant", ["tile", "bat"])
    def test_bone_folder_loads_in_todays_peft(self, variant: str, base: Path, tmp_path: Path) -> None:
        init: Any = "bat" if variant == "bat" else True
        trained = make_adapter(tmp_path / "adapter", base, init_weights=init)
        state = {key.replace("miss_block", "bone_block"): value for key, value in weights(tmp_path / "adapter").items()}
        save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
        # The first release wrote bat blocks under "init_weights": true.
        edit_json(tmp_path / "adapter" / "adapter_config.json", peft_type="BONE", init_weights=True, mini_r=...)
        made = convert(tmp_path / "adapter", tmp_path / "miss", to="miss")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.output)
        torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=0)

    @pytest.mark.parametrize("ending", ["disha", "bone"])
    @pytest.mark.parametrize("variant", ["tile", "bat"])
    def test_rwkv_state_dict(self, variant: str, ending: str, tmp_path: Path) -> None:
        """Names as RWKV-PEFT writes them, on layers of those names; the reference layers are the oracle."""

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.receptance, self.key = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.att = Attention()

        class Rwkv(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([Block(), Block()])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.cat([part(x) for block in self.blocks for part in (block.att.receptance, block.att.key)])

        torch.manual_seed(0)
        model, x = Rwkv(), torch.randn(3, 24)
        shape = (4, 4, 4) if variant == "bat" else (4, 16)
        shards = {
            f"blocks.{n}.att.{part}.{ending}": torch.randn(shape) for n in (0, 1) for part in ("receptance", "key")
        }
        torch.save(shards, tmp_path / "trained.pth")
        adapter = load_adapter(tmp_path / "trained.pth")
        assert (adapter.variant, adapter.rank) == (variant, 4)
        import copy

        wanted = attach(copy.deepcopy(model), Sum.of(adapter), torch.float32)(x)
        made = convert(tmp_path / "trained.pth", tmp_path / "miss", to="miss", base="BlinkDL/rwkv-7")
        found = PeftModel.from_pretrained(copy.deepcopy(model), made.output)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert json.loads((made.output / "adapter_config.json").read_text())["base_model_name_or_path"]

    @pytest.mark.parametrize(
        ("state", "match"),
        [
            ({"blocks.0.att.key.disha": torch.ones(4, 8), "emb.weight": torch.ones(2, 2)}, "holds emb.weight"),
            ({"blocks.0.att.key.disha": torch.ones(4)}, "has 1 dimensions"),
            ({".disha": torch.ones(4, 8)}, r"holds \.disha, which are no shards"),
            ({"a.key.bone": torch.ones(4, 8), "b.key.bone": torch.ones(3, 8)}, "different variants or ranks"),
            ({"a.key.bone": torch.ones(4, 8, dtype=torch.int64)}, "no shard"),
        ],
    )
    def test_state_dict_that_is_none(self, state: dict[str, torch.Tensor], match: str, tmp_path: Path) -> None:
        torch.save(state, tmp_path / "trained.pth")
        with pytest.raises(FossilExportError, match=match):
            convert(tmp_path / "trained.pth", tmp_path / "miss", to="miss")
        assert not (tmp_path / "miss").exists()


@pytest.mark.parametrize("to", ["lora", "miss"])
def test_a_task_that_peft_refuses_is_not_written(to: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / "adapter_config.json", task_type="CAUSAL")
    with pytest.raises(FossilExportError, match="task_type is 'CAUSAL', which PEFT refuses; make it one of SEQ_CLS"):
        convert(adapter, tmp_path / "out", to=to, base=base)
    assert not (tmp_path / "out").exists()
