"""What `make test-versions` asks of an environment that the wheel was installed into: the commands, as users type them.

    python -I .ci/installed.py [--torch [--onnx | --genai]]

Without --torch it needs nothing but that environment: a model and an adapter are written by hand, the adapter is
inspected, merged, verified, converted, sent to a Hub on this machine, and fetched from there. With it PEFT trains the
adapter, and the merged model is held against PEFT's own. --onnx and --genai make graphs of it, by PyTorch or GenAI,
which `verify` runs. The folder it stands in takes what is made.
"""

import json
import os
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import fossil_export

ENVIRONMENT = Path(sys.prefix)
COMMAND = ENVIRONMENT / "bin" / "fossil-export"
LOOPBACK = Path(__file__).parents[1] / "tests"
NAMES = ("fossil-export", "numpy", "click", "huggingface_hub", "transformers", "peft", "torch")
OF_GRAPHS = ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime-genai-cuda", "onnxscript", "gguf")
GRAPHS = ("merged fp32", "merged int4", "fused fp32", "tiled fp32", "swappable fp32", "swappable int4")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TOKEN = "hf_installed"


def told(*arguments: object, code: int = 0, **environment: str) -> str:
    """What the command says; it must end with `code`."""
    command = [str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code and "Traceback" not in said, f"{' '.join(command)}: {done.returncode}\n{said}"
    return said


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A file of safetensors, float32."""
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(values.tobytes() for values in tensors.values()))


def read(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content[start + one["data_offsets"][0] : start + one["data_offsets"][1]], "<f4").reshape(
            one["shape"]
        )
        for name, one in header.items()
    }


def by_hand(base: Path, adapter: Path) -> None:
    """A tiny Llama, and a MiSS adapter of rank 4 for it, in the files that transformers and PEFT write."""
    random = np.random.default_rng(0)
    layer, wide, inner, words = "model.layers.0", SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {f"{layer}.self_attn.{name}_proj.weight": (wide, wide) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, wide) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (wide, inner), "lm_head.weight": (words, wide)}
    shapes |= {f"{layer}.{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")}
    shapes |= {"model.embed_tokens.weight": (words, wide), "model.norm.weight": (wide,)}
    base.mkdir()
    write(base / "model.safetensors", {n: random.normal(size=s).astype("<f4") for n, s in shapes.items()})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps({**config, **SHAPE, **HEADS}))
    adapter.mkdir()
    name = f"base_model.model.{layer}.self_attn.q_proj.miss_block"
    write(adapter / "adapter_model.safetensors", {name: random.normal(size=(4, wide)).astype("<f4")})
    config = {"peft_type": "MISS", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "init_weights": True}))


def trained(base: Path, adapter: Path) -> None:
    """The same by transformers and PEFT, with weights that are not nought."""
    import torch
    from peft import MissConfig, get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    # With another rope_theta than the default, which some library may pass over.
    LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, rope_theta=5e5)).save_pretrained(base)
    words = Tokenizer(WordLevel({f"word{number}": number for number in range(50)}, unk_token="word0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0").save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MissConfig(r=4, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "miss" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(adapter)


def check_arithmetic(base: Path, adapter: Path, merged: Path) -> None:
    """Every value: row j of the shard, again and again, is added to column j."""
    before, after = read(base / "model.safetensors"), read(merged / "model.safetensors")
    assert before.keys() == after.keys()
    (shard,) = read(adapter / "adapter_model.safetensors").values()
    for name, values in before.items():
        wanted = values + np.tile(shard, (values.shape[1] // len(shard), 1)).T if "q_proj" in name else values
        assert np.array_equal(after[name], wanted), name


def check_against_peft(base: Path, adapter: Path, merged: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    found, before = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (merged, base))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found[name], weight)
        assert torch.equal(found[name], before[name]) == ("q_proj" not in name), name


def by_the_hub(base: Path, merged: Path) -> None:
    """Sent to a Hub, as far as its client can, and fetched from it. The Hub is on 127.0.0.1."""
    sys.path.insert(0, str(LOOPBACK))
    from loopback import LoopbackHub, environment

    client = tuple(map(int, version("huggingface_hub").split(".")[:2]))
    with LoopbackHub(Path("storage").absolute(), {TOKEN: "ada"}) as hub:
        hub.create("ada/base")
        hub.commit("ada/base", {path.name: path for path in base.iterdir()})
        mine = environment(hub, Path("home").absolute(), TOKEN)
        if client >= (1, 23):
            told("push", merged, "ada/merged", **mine)
            assert hub.read("ada/merged", "model.safetensors") == (merged / "model.safetensors").read_bytes()
        else:
            said = told("push", merged, "ada/merged", code=1, **mine)
            assert "too old to publish" in said and "huggingface-hub>=1.23" in said and said.count("\n") == 1, said
        told("merge", "adapter", "--base", "ada/base", "--output", "again", **mine)
        told("merge", "adapter", "--base", "ada/base", "--output", "off", **{**mine, "HF_HUB_OFFLINE": "1"})
        told("merge", "adapter", "--base", f"{hub.endpoint}/ada/base/tree/main", "--output", "page", **mine)
    for folder in ("again", "off", "page"):
        assert Path(folder, "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes(), folder


def as_graphs(base: Path, adapter: Path, runtime: str) -> None:
    for graph in GRAPHS:
        mode, precision = graph.split()
        how = ("--mode", mode, "--precision", precision, "--runtime", runtime)
        told("onnx", adapter, "--base", base, "--output", graph, *how)
        assert "parity" in told("verify", graph), graph
    told("convert", adapter, "--to", "onnx-adapter", "--for", GRAPHS[-1], "--output", "one.onnx_adapter")
    assert Path("one.onnx_adapter").read_bytes() == Path(GRAPHS[-1], "adapter.onnx_adapter").read_bytes()


def main() -> None:
    assert Path(fossil_export.__file__).is_relative_to(ENVIRONMENT), fossil_export.__file__
    assert told("--help").startswith("Usage: fossil-export")
    base, adapter, merged = (Path(name).absolute() for name in ("base", "adapter", "merged"))
    with_torch = "--torch" in sys.argv
    (trained if with_torch else by_hand)(base, adapter)
    assert "q_proj" in told("inspect", adapter)
    told("merge", adapter, "--base", base, "--output", merged)
    check_arithmetic(base, adapter, merged)
    told("verify", merged, "--level", "weights")
    told("convert", adapter, "--base", base, "--to", "lora", "--output", "lora")
    told("verify", "lora", "--level", "weights")
    if with_torch:
        check_against_peft(base, adapter, merged)
        told("verify", merged)
        told("verify", "lora")
    for option, runtime in (("--onnx", "torch"), ("--genai", "genai")):
        if option in sys.argv:
            as_graphs(base, adapter, runtime)
    if "--onnx" in sys.argv:
        told("convert", adapter, "--base", base, "--to", "gguf-lora", "--output", "lora.gguf")
    by_the_hub(base, merged)
    found = []
    for name in NAMES + (OF_GRAPHS if {"--onnx", "--genai"} & {*sys.argv} else ()):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    print("installed and used:", f"Python {sys.version.split()[0]},", ", ".join(found))


if __name__ == "__main__":
    main()
