"""Rounding to 16 bits scatters: a verdict takes as many positions as the built-in prompts have."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_tools
from click.testing import CliRunner

from fossil_export import verify
from fossil_export.cli import main
from fossil_export.errors import FossilExportError
from fossil_export.verifying import _forward
from fossil_export.verifying._forward import ForwardCheck, Subject, check_forward
from fossil_export.verifying._prompts import PROMPTS, read_prompts

bf16 = verify_tools.bf16

GIVEN = ("one", "two")
LENGTH, VOCABULARY = 12, 50


class Scripted:
    """A model with logits that are off the truth by a share: in the median `given` for the user's prompts, `others` for
    the built-in ones. As in real models a tenth of the positions are off by 2.8 times that, and more."""

    def __init__(self, given: float, others: float, seed: int, classes: bool = False) -> None:
        self._shares, self._seed, self._classes = (given, others), seed, classes

    def logits(self, tokens: list[int]) -> torch.Tensor:
        count = 1 if self._classes else len(tokens)
        truth = torch.randn(count, VOCABULARY, generator=_seeded(tokens[0]), dtype=torch.float64)
        noise = torch.randn(count, VOCABULARY, generator=_seeded(tokens[0] + self._seed), dtype=torch.float64)
        spread = torch.erfinv(2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1) * 2**0.5
        share = self._shares[tokens[0] >= len(GIVEN)] * (0.8 * spread).exp()[:, None]
        share = share[torch.randperm(count, generator=_seeded(tokens[0] + self._seed))]
        found = truth + share * noise * truth.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return found[0] if self._classes else found

    def generate(self, tokens: list[int], count: int) -> list[int] | None:
        return None

    def modules(self, tokens: list[int]) -> dict[str, torch.Tensor] | None:
        return None

    def close(self) -> None: ...


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the forward level on scripted models, whose shares are named (the given prompts, the built-in ones)."""

    def run(
        trainer: tuple[float, float],
        artifact: tuple[float, float],
        dtype: str = "bfloat16",
        prompts: tuple[str, ...] = GIVEN,
        classes: bool = False,
        length: int = 6,
    ) -> ForwardCheck:
        def tokenize(_: Path, texts: tuple[str, ...]) -> list[list[int]]:
            first = len(GIVEN) if texts == PROMPTS else 0
            return [[first + index] * (LENGTH if first else length) for index in range(len(texts))]

        models = iter([Scripted(0, 0, 1, classes), Scripted(*trainer, 1000, classes)])
        monkeypatch.setattr(_forward, "open_trainer", lambda *_: next(models))
        monkeypatch.setattr(_forward, "tokenize", tokenize)
        subject = Subject(Path(), lambda: Scripted(*artifact, 2000, classes))
        added: Any = None
        return check_forward(subject, Path(), added, dtype, 100, prompts, "cpu")

    return run


def test_noise_of_a_few_positions_is_no_fault(check: Any) -> None:
    """The figures of a real model, a ragged adapter in bfloat16, with two prompts and with all."""
    found = check(trainer=(0.036, 0.023), artifact=(0.088, 0.022))
    assert found.problem is None and (found.prompts, found.added_prompts) == (18, 16)
    assert found.asked == "2 prompts and 16 built-in ones"
    alone = check(trainer=(0.023, 0.023), artifact=(0.022, 0.022), prompts=PROMPTS)
    assert (alone.prompts, alone.added_prompts, alone.asked) == (16, 0, "16 prompts")


def test_a_fault_is_seen_on_all_prompts_and_on_the_given_ones(check: Any) -> None:
    everywhere = check(trainer=(0.036, 0.023), artifact=(0.04, 0.08))
    assert everywhere.problem.startswith("the logits of the median position are 0.0")
    here = check(trainer=(0.036, 0.023), artifact=(0.9, 0.022))  # as with one wrong row of an embedding
    assert here.problem.startswith("on the given prompts the logits of the median position are 0.")
    assert check(trainer=(0.036, 0.023), artifact=(float("nan"), 0.022)).problem


def test_a_lucky_trainer_is_not_held_against_the_artifact(check: Any) -> None:
    found = check(trainer=(0.002, 0.023), artifact=(0.06, 0.022), prompts=("one",), length=1)
    assert found.problem is None and found.asked == "1 prompt and 16 built-in ones"


def test_prompts_that_are_enough_are_judged_alone(check: Any) -> None:
    found = check(trainer=(0.02, 0), artifact=(0.05, 0), length=8 * LENGTH)
    assert found.added_prompts == 0 and "the median position are 0.05" in found.problem
    assert check(trainer=(0.02, 0), artifact=(0.02, 0), length=8 * LENGTH - 1).added_prompts == 16


def test_a_classifier_has_one_position_a_prompt(check: Any) -> None:
    assert check(trainer=(0.02, 0.02), artifact=(0.02, 0.02), length=100, classes=True).added_prompts == 16


def test_wide_dtypes_need_no_more_prompts(check: Any) -> None:
    found = check(trainer=(1e-6, 1e-6), artifact=(5e-6, 5e-6), dtype="float32")
    assert found.problem is None and found.added_prompts == 0
    assert check(trainer=(1e-6, 1e-6), artifact=(1e-4, 1e-6), dtype="float32").problem


def test_the_result_says_what_was_asked(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    done = CliRunner().invoke(main, ["verify", str(bf16), "--prompts", str(tmp_path / "prompts.txt")])
    assert done.exit_code == 0 and "(1 prompt and 16 built-in ones, truth in float64)" in done.stdout
    forward = verify(bf16, level="forward", prompts=tmp_path / "prompts.txt").to_dict()["forward"]
    assert (forward["prompts"], forward["added_prompts"]) == (17, 16)
    assert forward["same_continuations"] == [1, 1]  # of what was asked


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no /dev/zero")
def test_prompts_without_an_end_are_refused() -> None:
    with pytest.raises(FossilExportError, match=r"^/dev/zero: has more than 100,000,000 bytes, too many for prompts; "):
        read_prompts("/dev/zero")


def test_prompts_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\n\ntwo\r\n",))
    writer.start()
    assert read_prompts(pipe) == ("one", "two")
    writer.join()
