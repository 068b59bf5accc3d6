"""What `make test-install` asks of an environment that the wheel was installed into, beside a trainer that was there.

Needs nothing but that environment; its working folder takes what is made.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import MissConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fossil_export

ENVIRONMENT = Path(sys.prefix)
COMMAND = ENVIRONMENT / "bin" / "fossil-export"


def train(base: Path, adapter: Path) -> None:
    """A tiny model, and an adapter with weights that are not nought."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **shape)).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MissConfig(r=4, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "miss" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(adapter)


def main() -> None:
    assert Path(fossil_export.__file__).is_relative_to(ENVIRONMENT), fossil_export.__file__
    told = subprocess.run([COMMAND, "--help"], check=True, capture_output=True, text=True).stdout
    assert told.startswith("Usage: fossil-export"), told
    base, adapter, merged = (Path(name).absolute() for name in ("base", "adapter", "merged"))
    train(base, adapter)
    subprocess.run([COMMAND, "merge", adapter, "--base", base, "--output", merged], check=True)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    found, before = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (merged, base))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found[name], weight)
        assert torch.equal(found[name], before[name]) == ("q_proj" not in name), name
    names = ("fossil-export", "huggingface_hub", "transformers", "peft", "torch")
    print("installed and used:", ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
