"""Adapter folders of mlx-lm and mlx-vlm: `adapters.safetensors` beside an adapter_config.json of their own.

Writers: `train_model` in mlx_lm/lora.py and `train` in mlx_lm/tuner/trainer.py (github.com/ml-explore/mlx-lm),
`save_adapter` in mlx_vlm/trainer/utils.py (github.com/Blaizzy/mlx-vlm). The config of mlx-lm is every option of the
command; what of it says how the model computes is `fine_tune_type`, `num_layers` and `lora_parameters`, and in older
ones `lora_layers` and `use_dora`. Tensors are named by module, `….lora_a`, `….lora_b` and DoRA's `….m`; a switch layer
has those of all experts in one tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fossil_export.adapters._adapter import Adapter
from fossil_export.adapters._trained import Trained, by_module, empty, methods_of, split_key, trained_in
from fossil_export.checkpoints._dtypes import FLOATS
from fossil_export.checkpoints._folder import Folder
from fossil_export.checkpoints._header import TensorInfo, slice_of
from fossil_export.checkpoints._stamp import Stamp
from fossil_export.errors import AdapterError, CheckpointError, listed

WEIGHTS = "adapters.safetensors"
PEFT_TYPE = "MLX"

# Options of the training command: how training ran, not what came out of it (build_parser and CONFIG_DEFAULTS in
# mlx_lm/lora.py, in all its versions).
_TRAINING = {
    "adapter_file", "adapter_path", "batch_size", "clear_cache_threshold", "config", "data", "grad_accumulation_steps",
    "grad_checkpoint", "hf_dataset", "iters", "learning_rate", "lr_schedule", "mask_prompt", "max_seq_length",
    "max_tokens", "optimizer", "optimizer_config", "project_name", "prompt", "report_to", "resume_adapter_file",
    "save_every", "seed", "steps_per_eval", "steps_per_report", "temp", "test", "test_batches", "train",
    "trust_remote_code", "val_batches", "wandb",
}  # fmt: skip
_OURS = {"model", "fine_tune_type", "num_layers", "lora_layers", "lora_parameters", "use_dora"}
_LORA = {"rank", "scale", "dropout", "keys", "alpha"}

CHANGED_AT_LOADING = {
    "falcon_h1": "multiplies its weights when it loads them, so that training began beside other weights than the base",
    "granite4_vision": "adds updates to its weights when it loads them, so that training began beside other weights",
}
CHANGED_HEADS = dict.fromkeys(
    ("bailing_moe", "bailing_moe_linear", "baichuan_m1"), "changes the head when it loads it, beside which it trained"
)
"""Model types whose `sanitize` in mlx_lm/models or mlx_vlm/models computes other linear weights than the checkpoint
has, or another head alone."""

# How the experts of a switch layer are called in checkpoints, by what lies around it (`sanitize` in mlx_lm/models).
_EXPERTS = {
    "mlp.switch_mlp": ("mlp.experts", {}),
    "block_sparse_moe.switch_mlp": (
        "block_sparse_moe.experts",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
}


def is_mlx(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a folder with these files and this adapter_config.json is MLX's, not PEFT's."""
    if "peft_type" in config:
        return False
    found = set(names)
    own = {"fine_tune_type", "lora_parameters", "lora_layers"} & config.keys()
    return bool(own) or WEIGHTS in found or "adapters.npz" in found


def load_mlx(
    given: Path, config: Mapping[str, Any], weights: Path | None, home: Folder, stamps: Mapping[Path, Stamp]
) -> Adapter:
    """Read such a folder, `home`; `weights` is the file in it that was asked for.

    Raises AdapterError for what is no LoRA or DoRA, or not understood.
    """
    path = home.path / "adapter_config.json"
    numbers = _numbers(path, config)
    weights = weights or home.path / WEIGHTS
    if weights.name not in home.root_names():
        raise AdapterError(
            f"{home.path}: has no {weights.name}, which MLX writes beside its config; name the folder of a training "
            "that was saved (of an older mlx-lm: load its adapters.npz and save it again)"
        )
    try:
        home.check_links([path.name, weights.name])
        (header,) = home.headers([weights.name])
    except CheckpointError as problem:
        raise AdapterError(str(problem)) from problem
    methods = methods_of(PEFT_TYPE)
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in header.tensors:
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}; "
                "save the adapter again"
            )
        ending = tensor.name.rpartition(".")[2]
        split = split_key(tensor.name, _ROLES)
        if split is None:
            raise AdapterError(
                f"{weights}: tensor {tensor.name} is no LoRA or DoRA ({', '.join(f'….{one}' for one in _ROLES)}), but "
                "was trained beside it; fuse the adapter with MLX, which knows how such a weight lies"
            )
        parts[split[0]][_ROLES[ending]] = tensor
    if not parts:
        raise AdapterError(f"{weights}: holds no LoRA; was the adapter saved before training?")
    trained = by_module(one for module, own in parts.items() for one in _module(weights, module, own, methods, numbers))
    _check(path, config, list(parts), trained, numbers)
    return Adapter(
        path=given,
        peft_type=PEFT_TYPE,
        base_model=config.get("model") or None,
        base_revision=None,
        config={},
        trained=trained,
        saved={},
        files=(path, weights),
        home=home,
        headers=(header,),
        stamps=stamps,
        is_pefts=False,
        keeps_ties=True,
        unfit=CHANGED_AT_LOADING | (CHANGED_HEADS if any("lm_head" in name for name in trained) else {}),
    )


# The last are those of mlx-vlm's first format.
_ROLES = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "m", "A": "lora_a", "B": "lora_b"}


def _module(
    weights: Path,
    module: str,
    tensors: Mapping[str, TensorInfo],
    methods: Mapping[str, Mapping[str, str]],
    numbers: Mapping[str, Any],
) -> Iterator[Trained]:
    if not any(f".{part}." in f".{module}" for part in ("switch_mlp", "switch_glu")):
        yield from trained_in(weights, module, tensors, methods, numbers)
        return
    for name, own in _experts(weights, module, tensors, numbers["r"]):
        plain = {"lora_a": "A", "lora_b": "B"}
        for one in trained_in(weights, name, own, {"lora": plain}, {"r": numbers["r"]}):
            yield replace(one, numbers={"r": numbers["r"], "scale": float(numbers["scale"])})


def _experts(
    weights: Path, module: str, tensors: Mapping[str, TensorInfo], rank: int
) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """The LoRA of each expert of a switch layer: a (experts, r, in), before mlx-lm 0.28.3 (experts · r, in), and b
    (experts, out, r), both as in PEFT (`LoRASwitchLinear` in mlx_lm/tuner/lora.py)."""
    where = f"{weights}: {module}"
    parent, _, last = module.rpartition(".")
    known = next((known for known in _EXPERTS if parent == known or parent.endswith(f".{known}")), None)
    if known is None:
        raise AdapterError(f"{where} is a layer of experts, of which it is unknown what checkpoints call them; fuse it")
    if tensors.keys() != {"lora_a", "lora_b"}:
        raise AdapterError(f"{where} has {listed(sorted(tensors))}, not lora_a and lora_b; save the adapter again")
    down, up = tensors["lora_a"], tensors["lora_b"]
    for info in (down, up):
        if 0 in info.shape:
            raise AdapterError(empty(f"{weights}: {info.name} {list(info.shape)}"))
    flat = len(down.shape) == 2
    if len(up.shape) != 3 or len(down.shape) not in (2, 3) or up.shape[2] != rank:
        raise AdapterError(f"{where}: its lora_a {list(down.shape)} and lora_b {list(up.shape)} do not go together")
    count, outputs, _ = up.shape
    inputs = down.shape[-1]
    if down.shape != ((count * rank, inputs) if flat else (count, rank, inputs)):
        raise AdapterError(f"{where}: its lora_a {list(down.shape)} and lora_b {list(up.shape)} do not go together")
    called, names = _EXPERTS[known]
    root = f"{parent.removesuffix(known)}{called}"
    for expert in range(count):
        yield (
            f"{root}.{expert}.{names.get(last, last)}",
            {
                "lora_a": slice_of(down, expert * rank * inputs, rank * inputs, (rank, inputs)),
                "lora_b": slice_of(up, expert * outputs * rank, outputs * rank, (outputs, rank)),
            },
        )


def _numbers(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of every module: "r", "scale", alpha = r · scale, and whether it is DoRA."""
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind == "full":
        raise AdapterError(
            f"{path}: fine_tune_type is full: its weights are the model's own, in MLX's layout, and there is nothing "
            "to merge; mlx_lm.fuse writes the whole model"
        )
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}, not lora or dora; fuse it with the tool that wrote it")
    lora = config.get("lora_parameters")
    if lora is None and "rank" in config:  # mlx-vlm's first format
        lora, config = {name: config[name] for name in config if name in _LORA}, {}
        lora["scale"] = lora.pop("alpha", 0.1) / lora["rank"] if _is_rank(lora["rank"]) else None
    unknown = [
        name for name in config if name not in _TRAINING | _OURS and config[name] not in (None, False, [], {}, "")
    ]
    if not isinstance(lora, dict):
        raise AdapterError(f"{path}: has no lora_parameters, which say the rank and the scale; mend the config")
    unknown += [f"lora_parameters.{name}" for name in lora if name not in _LORA]
    if unknown:
        raise AdapterError(
            f"{path}: sets {listed(unknown)}, which fossil-export does not understand; the merge could be wrong, so it "
            "stops here (a newer version may know it)"
        )
    rank, scale = lora.get("rank"), lora.get("scale")
    if not _is_rank(rank):
        raise AdapterError(f"{path}: lora_parameters.rank is {rank!r}, expected a positive integer")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterError(f"{path}: lora_parameters.scale is {scale!r}, expected a number")
    # Until June 2024 the scale was scale · alpha / rank; num_layers is younger than that.
    if lora.get("alpha") not in (None, rank) and "num_layers" not in config:
        raise AdapterError(
            f"{path}: lora_parameters has an alpha of {lora['alpha']!r}, by which mlx-lm multiplied the scale until "
            "June 2024, and not since; take it out, and make scale what the training had"
        )
    return {"r": rank, "scale": scale, "dora": kind == "dora"}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check(
    path: Path,
    config: Mapping[str, Any],
    modules: Sequence[str],
    trained: Mapping[str, Trained],
    numbers: Mapping[str, Any],
) -> None:
    """Raise AdapterError if the tensors are not those that the config says were trained."""
    lora = config.get("lora_parameters")
    keys = lora.get("keys") if isinstance(lora, dict) else None
    if keys is not None:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise AdapterError(f"{path}: lora_parameters.keys is {keys!r}, expected a list of names")
        strays = [name for name in modules if not any(name == key or name.endswith(f".{key}") for key in keys)]
        if strays:
            raise AdapterError(
                f"{path}: lora_parameters.keys does not cover {listed(strays)}, for which there are tensors; the files "
                "do not belong together"
            )
    kinds = {one.method.startswith("dora") for one in trained.values()}
    if kinds != {numbers["dora"]}:
        raise AdapterError(
            f"{path}: says that it is {'DoRA' if numbers['dora'] else 'LoRA'}, and the tensors are of another kind; "
            "the files do not belong together"
        )
    if not isinstance(config.get("model"), (str, type(None))):
        raise AdapterError(f"{path}: model is {config['model']!r}, expected a name; mend the config")
