"""A small Llama, adapters of every kind that PEFT trains, and judges: PEFT's forward pass and PEFT's own merge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.fuzz.subject import Unjudged

CONFIG, BASE_CONFIG = "adapter_config.json", "config.json"
TARGETS = ["q_proj", "down_proj"]
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


def kinds() -> dict[str, Callable[[], Any]]:
    """Configs by name."""
    import peft

    lora: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
    pattern = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.down_proj": 3}}
    return {
        "tile": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
        "bat": lambda: peft.MissConfig(r=4, target_modules=TARGETS, init_weights="bat"),
        "mini": lambda: peft.MissConfig(r=4, mini_r=4, target_modules=TARGETS, init_weights="mini"),
        "lora": lambda: peft.LoraConfig(**lora),
        "lora of a pattern": lambda: peft.LoraConfig(r=4, target_modules=r".*\.(q_proj|down_proj)", **pattern),
        "lora of layers": lambda: peft.LoraConfig(**lora, layers_to_transform=[1], layers_pattern="layers"),
        "lora without some": lambda: peft.LoraConfig(**lora, exclude_modules=r".*layers\.0\.mlp.*", use_rslora=True),
        "lora with a head": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "lora with tokens": lambda: peft.LoraConfig(**lora, trainable_token_indices=[1, 5]),
        "lora of embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"]),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
        "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
        "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
        "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], projection_prng_key=1),
        "road": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=8),
        "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[0, 3], target_modules=["embed_tokens"]),
        "hira": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
        "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=TARGETS),
        "delora": lambda: peft.DeloraConfig(r=4, target_modules=TARGETS),
        "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
        "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS),
        "shira": lambda: peft.ShiraConfig(r=2, target_modules=TARGETS),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"]),
        "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=TARGETS),
    }


def llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def make_base(folder: Path, **saving: Any) -> None:
    llama().save_pretrained(folder, **saving)


def make_adapter(folder: Path, kind: str, base: Path, seed: int = 0) -> None:
    """An adapter whose tensors moved a little from where training begins. One that PEFT cannot make is left out."""
    import torch
    from peft import get_peft_model

    adapted = get_peft_model(load(base), kinds()[kind]())
    adapted.peft_config["default"].base_model_name_or_path = "base"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    adapted.save_pretrained(folder)


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.manual_seed(0)  # for what a checkpoint lacks
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(base: Path, adapters: list[tuple[Path, float]]) -> Any:
    """The base with all adapters active, each times its weight. Raises Unjudged where the libraries refuse."""
    from peft import PeftModel

    try:
        model = load(base)
        (first, weight), *more = adapters
        trained = PeftModel.from_pretrained(model, str(first), adapter_name="a0")
        for number, (path, _) in enumerate(more, 1):
            trained.load_adapter(str(path), adapter_name=f"a{number}")
        names = [f"a{number}" for number in range(len(adapters))]
        if more:
            trained.base_model.set_adapter(names)
        for name, (_, times) in zip(names, [(first, weight), *more], strict=True):
            if times != 1:
                for module in trained.modules():
                    if hasattr(module, "scale_layer") and name in getattr(module, "scaling", {}):
                        module.scaling[name] *= times
        return trained.eval()
    except Exception as problem:
        raise Unjudged(f"{type(problem).__name__}: {problem}"[:500]) from problem


def judge_merge(folder: Path, adapters: list[tuple[str, float]] | None = None, tolerance: float = 1e-4) -> str | None:
    """`out` against the damaged inputs, in what they answer; and if the libraries refuse these, against the weights
    that they give with a sound config in the place of a damaged one: the damage was none to the weights then."""
    found = [(folder / name, weight) for name, weight in adapters or [("adapter", 1.0)]]
    out = folder / "out"
    try:
        trained = adapted(folder / "base", found)
        merged = load_merged(out)
    except Unjudged as reason:
        return judge_weights(folder, found, out, str(reason), tolerance)
    try:
        expected = answers(trained)
    except Exception as problem:
        return judge_weights(folder, found, out, f"{type(problem).__name__}: {problem}", tolerance)
    return difference(answers(merged), expected, tolerance)


def load_merged(out: Path) -> Any:
    try:
        return load(out)
    except Exception as problem:
        raise Unjudged(f"the merged model: {type(problem).__name__}: {problem}"[:500]) from problem


def answers(model: Any) -> Any:
    import torch

    tokens = torch.arange(12)[None] % 64
    with torch.no_grad():
        return model.double()(tokens).logits


def difference(found: Any, expected: Any, tolerance: float) -> str | None:
    if found.shape != expected.shape:
        return f"has the shape {list(found.shape)}, not {list(expected.shape)}"
    odd = ~expected.isfinite()
    if not bool((odd == ~found.isfinite()).all()):
        return f"is not finite in {int((~found.isfinite()).sum())} places, the trained model in {int(odd.sum())}"
    distance = float((found - expected)[~odd].norm())
    size = float(expected[~odd].norm())
    return None if distance <= tolerance * max(size, 1e-30) else f"differs by {distance / max(size, 1e-30):.2g}"


def judge_weights(
    folder: Path, adapters: list[tuple[Path, float]], out: Path, reason: str, tolerance: float
) -> str | None:
    """PEFT's own merge of the damaged folders with sound configs, tensor by tensor."""
    sound = folder / "sound"
    beside = folder / "beside"
    for configs in ((BASE_CONFIG,), (CONFIG,), (BASE_CONFIG, CONFIG)):
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(folder / "base", beside / "base")
        again = []
        for path, weight in adapters:
            copy = beside / path.relative_to(folder)
            shutil.copytree(path, copy)
            again.append((copy, weight))
            if CONFIG in configs:
                shutil.copyfile(sound / path.relative_to(folder) / CONFIG, copy / CONFIG)
        if BASE_CONFIG in configs:
            if (own := beside / "base" / BASE_CONFIG).is_dir():
                own.rmdir()
            shutil.copyfile(sound / "base" / BASE_CONFIG, own)
        try:
            expected = adapted(beside / "base", again).merge_and_unload().state_dict()
        except Exception:
            continue
        return same_weights(tensors(out), expected, tolerance)
    return judge_untouched(folder, adapters, out, reason, tolerance)


def judge_untouched(
    folder: Path, adapters: list[tuple[Path, float]], out: Path, reason: str, tolerance: float
) -> str | None:
    """PEFT's merge of the sound folders, if all damage is to tensors of the base that nothing was trained for, which
    must be as they are."""
    try:
        damaged, before = tensors(folder / "base"), tensors(folder / "sound" / "base")
        again = [(folder / "sound" / path.relative_to(folder), weight) for path, weight in adapters]
        expected = adapted(folder / "sound" / "base", again).merge_and_unload().state_dict()
        if any(
            tensors(path) != {} and not equal(tensors(path), tensors(own))
            for (path, _), (own, _) in zip(adapters, again, strict=True)
        ):
            raise Unjudged(reason)
    except Exception as problem:
        raise Unjudged(reason) from problem
    for name in damaged.keys() | before.keys():
        if equal({name: damaged.get(name)}, {name: before.get(name)}):
            continue
        if name in before and name in expected and not equal({name: before[name]}, {name: expected[name]}):
            raise Unjudged(reason)  # it was trained
        expected.pop(name, None)
        if name in damaged:
            expected[name] = damaged[name]
    return same_weights(tensors(out), expected, tolerance)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(
        value is other[name] or (value is not None and other[name] is not None and torch.equal(value, other[name]))
        for name, value in one.items()
    )


def same_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> str | None:
    for name, value in found.items():
        if name in expected and (problem := difference(value.double(), expected[name].double(), tolerance)):
            return f"{name} {problem}"
    missing = sorted(expected.keys() - found.keys() - {"lm_head.weight"})
    return f"lacks {missing[:3]}" if missing else None


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
