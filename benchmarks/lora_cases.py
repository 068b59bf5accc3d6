"""Small cases of LoRA and its kin, each merged by fossil-export, PEFT and axolotl, against the live trained model.

    python benchmarks/lora_cases.py --axolotl-source ../axolotl/src

A tiny random model is trained at random in every way that PEFT's LoRA has; a merge is right if its folder, loaded by
its own class, gives the logits of the unmerged model (float64). Where no weights can be the trained model, a refusal is
right. Prints a table; exits with 1 if fossil-export is wrong anywhere. axolotl need not be installed (merge_lora.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import common
import merge_lora
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fossil_export import merge
from fossil_export.errors import FossilExportError

IDS = torch.tensor([[5, 17, 99, 4, 63, 63, 20, 11]])
CLOSE = 1e-5
SMALL = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QV = ["q_proj", "v_proj"]
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """`more` are LoraConfig's arguments; `model` is the class that is trained, of a base of class `base`; `damage` is
    done to the adapter's folder, and `refused` says that no merge is right."""

    name: str
    more: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: str = "LlamaForCausalLM"
    base: str | None = None
    resize: int | None = None
    refused: bool = False
    damage: Damage | None = None
    convert: bool = False


def _config(name: str, more: dict[str, Any]) -> Any:
    kind = getattr(transformers, name).config_class
    if name.startswith("GPT2"):
        return kind(n_embd=48, n_layer=2, n_head=4, vocab_size=120, n_positions=64, **more)
    if name.startswith("Llava"):
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision |= {"image_size": 16, "patch_size": 8}
        text = transformers.LlamaConfig(**SMALL)
        return kind(text_config=text, vision_config=transformers.CLIPVisionConfig(**vision), image_token_id=119)
    if name.startswith("Mixtral"):
        more = {"num_local_experts": 4, **more}
    return kind(**SMALL, tie_word_embeddings=more.pop("tie_word_embeddings", False), **more)


def _edit(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return damage


def _no_half(found: dict[str, torch.Tensor]) -> None:
    del found[next(name for name in found if "lora_A" in name)]


def _nan(found: dict[str, torch.Tensor]) -> None:
    found[next(name for name in found if "lora_B" in name)][0, 0] = float("nan")


def _another_layer(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if ".layers.1." in name]:
        found[name.replace(".layers.1.", ".layers.2.")] = found[name].clone()


def _half(found: dict[str, torch.Tensor]) -> None:
    for name in found:
        found[name] = found[name].to(torch.bfloat16)


def _pickled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


TIED = {"tie_word_embeddings": True}
CASES = [
    Case("q and v"),
    Case("every linear layer", {"target_modules": "all-linear"}),
    Case("alpha", {"lora_alpha": 13}),
    Case("rsLoRA", {"use_rslora": True}),
    Case("rank pattern", {"rank_pattern": {"q_proj": 3}}),
    Case("alpha pattern", {"alpha_pattern": {r"layers\.1\..*": 5}}),
    Case("excluded modules", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    Case("one layer", {"layers_to_transform": [1]}),
    Case("GPT-2's Conv1D", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, model="GPT2LMHeadModel"),
    Case("embedding", {"target_modules": [*QV, "embed_tokens"]}),
    Case("head", {"target_modules": [*QV, "lm_head"]}),
    Case("tied, embedding", {"target_modules": [*QV, "embed_tokens"]}, TIED),
    Case("tied, head", {"target_modules": [*QV, "lm_head"]}, TIED),
    Case("tied, both", {"target_modules": [*QV, "embed_tokens", "lm_head"]}, TIED),
    Case("tied, kept so", {"target_modules": [*QV, "embed_tokens", "lm_head"], "ensure_weight_tying": True}, TIED),
    Case("tied, saved embedding", {"modules_to_save": ["embed_tokens"]}, TIED),
    Case("tied, saved head", {"modules_to_save": ["lm_head"]}, TIED),
    Case("saved head", {"modules_to_save": ["lm_head"]}),
    Case("saved norms", {"modules_to_save": ["norm"]}),
    Case("bias of B", {"lora_bias": True}, {"attention_bias": True}),
    Case("all biases", {"bias": "all"}, {"attention_bias": True}),
    Case("biases of its layers", {"bias": "lora_only"}, {"attention_bias": True}),
    Case("classifier", {"task_type": "SEQ_CLS"}, model="LlamaForSequenceClassification", base="LlamaForCausalLM"),
    Case("trained tokens", {"trainable_token_indices": [3, 17]}),
    Case("tied, trained tokens", {"trainable_token_indices": [3, 17]}, TIED),
    Case("resized vocabulary", {"modules_to_save": ["embed_tokens", "lm_head"]}, resize=125),
    Case(
        "experts' parameters",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        model="MixtralForCausalLM",
    ),
    Case("replicated layers", {"layer_replication": [[0, 2], [1, 2]]}),
    Case("PiSSA, converted", {"init_lora_weights": "pissa"}, convert=True),
    Case("PiSSA, as trained", {"init_lora_weights": "pissa"}),
    Case("OLoRA, as trained", {"init_lora_weights": "olora"}),
    Case("DoRA", {"use_dora": True}),
    Case("DoRA, rsLoRA", {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}),
    Case("text model of LLaVA", model="LlavaForConditionalGeneration"),
    Case("bfloat16 factors", damage=_tensors(_half)),
    Case("pickled", damage=_pickled),
    Case("aLoRA", {"alora_invocation_tokens": [63]}, refused=True),
    Case("a half is missing", refused=True, damage=_tensors(_no_half)),
    Case("NaN", refused=True, damage=_tensors(_nan)),
    Case("a layer too many", refused=True, damage=_tensors(_another_layer)),
    Case("LoftQ, as trained", refused=True, damage=_edit(init_lora_weights="loftq")),
    Case("QA-LoRA", refused=True, damage=_edit(use_qalora=True)),
    Case("unknown setting", refused=True, damage=_edit(use_something_new=True)),
]


def make(case: Case, folder: Path) -> torch.Tensor | None:
    """Write base and adapter; the logits of the live model, None if no weights can give them."""
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    named = case.base or case.model
    getattr(transformers, named)(_config(named, dict(case.config))).save_pretrained(base)
    model = load(case, base)
    if case.resize:
        model.resize_token_embeddings(case.resize, mean_resizing=False)
    more = {"target_modules": QV, **case.more}
    live = get_peft_model(model, LoraConfig(r=4, **more))
    if case.convert:
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(folder / "start")
        live.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(1)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    if case.convert:
        live.save_pretrained(adapter, path_initial_model_for_weight_conversion=str(folder / "start"))
    else:
        live.save_pretrained(adapter)
    if case.damage is not None:
        case.damage(adapter)
    if case.refused:
        return None
    if case.damage is not None:  # the trained model is what PEFT makes of the folder
        live = PeftModel.from_pretrained(load(case, base), adapter)
    return logits(live)


def load(case: Case, folder: Path) -> Any:
    # Grouped products of experts take no float64.
    more = {"experts_implementation": "eager"} if case.model.startswith("Mixtral") else {}
    return getattr(transformers, case.model).from_pretrained(folder, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(input_ids=IDS).logits
    return found


def judge(case: Case, output: Path, wanted: torch.Tensor | None) -> str:
    if wanted is None:
        return "wrong: merged"
    try:
        got = logits(load(case, output))
    except Exception as problem:
        return f"wrong: {type(problem).__name__}"
    if got.shape != wanted.shape:
        return "wrong: another shape"
    far = float((got - wanted).abs().max() / wanted.abs().max())
    return "right" if far < CLOSE else f"wrong by {far:.0e}"


def by_fossil_export(case: Case, folder: Path) -> str | None:
    try:
        merge(folder / "adapter", folder / "output", base=folder / "base")
    except FossilExportError as problem:
        return str(problem)
    return None


def by_peft(case: Case, folder: Path) -> str | None:
    try:
        model = load(case, folder / "base")
        if case.resize:  # as its documentation says
            model.resize_token_embeddings(case.resize, mean_resizing=False)
        merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "output")
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def by_axolotl(source: str) -> Callable[[Case, Path], str | None]:
    def run(case: Case, folder: Path) -> str | None:
        places = [str(folder / name) for name in ("base", "adapter", "output")]
        done = subprocess.run(
            [sys.executable, "-c", merge_lora.AXOLOTL, source, *places], capture_output=True, text=True
        )
        return done.stderr.strip().splitlines()[-1] if done.returncode else None

    return run


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--axolotl-source", help="its folder src")
    parser.add_argument("--only", help="cases whose names have this")
    parser.add_argument("-v", action="store_true", help="say why a case was refused")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    contestants: dict[str, Callable[[Case, Path], str | None]] = {"fossil-export": by_fossil_export, "PEFT": by_peft}
    if options.axolotl_source:
        contestants["axolotl"] = by_axolotl(options.axolotl_source)
    rows, good = [], dict.fromkeys(contestants, 0)
    chosen = [case for case in CASES if not options.only or options.only in case.name]
    for case in chosen:
        verdicts = []
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with contextlib.redirect_stderr(io.StringIO()):
                wanted = make(case, folder)
            for name, run in contestants.items():
                with contextlib.redirect_stderr(io.StringIO()):
                    refusal = run(case, folder)
                verdict = "refused" if refusal is not None else judge(case, folder / "output", wanted)
                good[name] += verdict == ("refused" if case.refused else "right")
                verdicts.append(verdict if verdict == ("refused" if case.refused else "right") else f"**{verdict}**")
                if options.v and refusal is not None:
                    common.say(f"{case.name}, {name}: {refusal.replace(str(folder), '…')}")
                shutil.rmtree(folder / "output", ignore_errors=True)
        rows.append([case.name, *verdicts])
    rows.append([f"right, of {len(chosen)}", *(str(count) for count in good.values())])
    print(f"{common.machine('torch', 'transformers', 'peft')}\n")
    print(common.table(["", *contestants], rows))
    raise SystemExit(good["fossil-export"] < len(chosen))


if __name__ == "__main__":
    main()
