"""Training over quantized weights fits the quantized model: the real one, asked in each way of merging.

The truth is PEFT's live model over the weights that training saw, in float32. benchmarks/quantized.py has the tables.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized
import smollm2
import torch
from quantized import Asked, Weights, distance, each, left_of, less, merged, nf4, weights_of

Truth = list[torch.Tensor]


@pytest.fixture(scope="module")
def base() -> Path:
    return quantized.dequantized("nf4")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return smollm2.adapter_on(base, *quantized.ADAPTERS["LoRA r = 16"])


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


@pytest.fixture(scope="module")
def truth(asked: Asked, base: Path, adapter: Path) -> Truth:
    return asked.live(base, adapter)


@pytest.fixture(scope="module")
def whole(base: Path, adapter: Path) -> Weights:
    return merged(adapter, base)


def test_merged_into_the_dequantized_base_it_is_the_trained_model(asked: Asked, truth: Truth, whole: Weights) -> None:
    off = distance(asked.logits(whole), truth)
    assert off.top1 >= 0.99 and off.most < 0.02, off
    assert asked.answers(whole)


def test_merged_into_the_original_it_is_another_one(
    asked: Asked, truth: Truth, whole: Weights, base: Path, adapter: Path
) -> None:
    near = distance(asked.logits(whole), truth)
    far = distance(asked.logits(merged(adapter, smollm2.base_model())), truth)
    assert far.least > 10 * near.most and far.top1 < 0.95, (near, far)


def test_quantized_again_it_has_lost_the_update(
    asked: Asked, truth: Truth, whole: Weights, base: Path, adapter: Path
) -> None:
    seen, again = weights_of(base), each(whole, nf4)
    update = less(merged(adapter, base, dtype="float32"), seen)
    assert left_of(whole, seen, update)[0] > 0.99 and left_of(again, seen, update)[0] < 0.2
    off, none = (distance(asked.logits(weights), truth) for weights in (again, seen))
    assert off.least > 0.3 and off.top1 < 0.7 and none.top1 < 0.7, (off, none)
