"""A two-layer model: trained by PEFT, merged whole on the CPU and on the device, and run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model

import fossil_export
from fossil_export.verifying._bounds import distance
from gpu.cases import REPEATS, SEED, Case, ModelRow, Setup, blank
from gpu.tools import Scratch, compare_folders, free

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Models:
    """Makes the rows of the model. The base is written once for each dtype; merged models do not outlive their row."""

    def __init__(self, setup: Setup, scratch: Scratch) -> None:
        self._setup, self._scratch = setup, scratch
        self._dtype = ""

    def row(self, case: Case) -> ModelRow:
        """Train an adapter for the saved base, merge it on both devices and run the result."""
        setup, scratch = self._setup, self._scratch
        row = blank(setup, case)
        assert isinstance(row, ModelRow)
        base = self._base(case.dtype)
        torch.manual_seed(SEED)
        config = setup.variants[case.variant].config(target_modules=list(LINEARS), task_type="CAUSAL_LM")
        model = get_peft_model(_load(base, case.dtype, setup.device), config)
        losses = _train(model, setup, case.dtype)
        row = replace(row, losses=losses)
        finite = all(bool(torch.isfinite(shard).all()) for shard in model.parameters() if shard.requires_grad)
        if not finite or not all(math.isfinite(loss) for loss in losses):
            return replace(row, diverged=True)
        adapter = scratch.empty("adapter")
        model.save_pretrained(adapter)
        scratch.note()
        prompts = torch.randint(setup.vocab, (2, setup.tokens), device=setup.device)
        trainer = _logits(model, prompts)
        truth = _logits(model.double(), prompts)
        del model
        free()
        repeats = REPEATS if case.dtype == "bfloat16" and case.variant in ("tile", "bat", "lora") else 1
        folders, seconds, nbytes = [], [], 0
        for name, device in (("cpu", "cpu"), ("device", setup.engine_device)):
            folders.append(scratch.folder / name)
            runs = []
            for _ in range(repeats):
                scratch.drop(name)
                result = fossil_export.merge(adapter, folders[-1], base=base, device=device)
                scratch.note()
                runs.append(result.seconds)
            nbytes = result.plan.nbytes
            seconds.append(tuple(runs))
        devices = compare_folders(folders[0], folders[1], case.dtype)
        merged = _logits(_load(folders[1], case.dtype, setup.device), prompts)
        scratch.drop("adapter", "cpu", "device")
        theirs, ours = distance(trainer, truth), distance(merged, truth)
        return replace(
            row,
            errors=((theirs.relative_error, ours.relative_error), (theirs.worst_tenth, ours.worst_tenth)),
            devices=devices,
            top1=(theirs.top1, ours.top1),
            nbytes=nbytes,
            seconds=tuple(seconds),
        )

    def close(self) -> None:
        self._dtype = ""
        self._scratch.drop("base", "adapter", "cpu", "device")
        free()

    def _base(self, dtype: str) -> Path:
        """A random two-layer Llama, saved in `dtype`."""
        if self._dtype == dtype:
            return self._scratch.folder / "base"
        setup, folder = self._setup, self._scratch.empty("base")
        torch.manual_seed(SEED)
        config = transformers.LlamaConfig(
            hidden_size=setup.model.hidden,
            intermediate_size=setup.model.inner,
            num_hidden_layers=2,
            num_attention_heads=setup.model.heads,
            num_key_value_heads=setup.model.kv_heads,
            vocab_size=setup.vocab,
        )
        with torch.device(setup.device):
            model = transformers.LlamaForCausalLM(config)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        self._scratch.note()
        self._dtype = dtype
        return folder


def _load(folder: Path, dtype: str, device: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)


def _train(model: Any, setup: Setup, dtype: str) -> tuple[float, float]:
    """Train the shards on one batch of random tokens; returns the first and the last loss."""
    batch = torch.randint(setup.vocab, (2, setup.tokens), device=setup.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setup.rate)
    # AdamW does not mind the scale of the loss; float16's gradients would vanish without one.
    scale = 1024.0 if dtype == "float16" else 1.0
    losses = []
    for _ in range(setup.steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def _logits(model: Any, prompts: Any) -> list[Any]:
    """(positions, vocabulary) of each prompt, in float64 on the CPU."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=prompt[None]).logits[0].double().cpu() for prompt in prompts]
