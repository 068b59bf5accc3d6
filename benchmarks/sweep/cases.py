"""One class after the other: the model, its adapters, the merge, the verdicts."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file

from fossil_export import FossilExportError, merge, models
from sweep import judging
from sweep.building import Base, Unbuilt, line, randomise, saved, state
from sweep.catalogue import Entry
from sweep.kinds import KINDS, Recipe, recipes

SECONDS = 60  # a case, or the making of a model
NOT_BUILT = "-"  # the kind of a row that says why a class is not there
ALL_DONE = "="  # of the last row of a class that is
PARAMETERS_ONLY = "parameters only"
NOT_COMPUTED = "the trainer does not compute with what it trained"

EXACT, RIGHT, WRONG, REFUSED, CRASH = "exact", "right", "WRONG", "refused", "crash"
IMPOSSIBLE, UNUSED, BUILT = "impossible", "unused", "built"
RESULTS = (EXACT, RIGHT, WRONG, REFUSED, CRASH, IMPOSSIBLE, UNUSED)


@dataclass(frozen=True)
class Row:
    """What came of one case. `peft` is what PEFT's own merge is: right, wrong, or that it cannot."""

    name: str
    model_type: str
    kind: str
    result: str
    why: str = ""
    peft: str = ""
    forward: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class _Scene:
    entry: Entry
    base: Base
    values: dict[str, torch.Tensor]
    question: judging.Question | None
    folder: Path


class _TooSlow(BaseException):
    """No `except Exception` on the way may take it."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooSlow


def run_class(entry: Entry, folder: Path, kinds: Collection[str], done: Collection[str]) -> Iterator[Row | str]:
    """Rows as they come; before each, the name of its kind. `folder` is emptied in between."""
    signal.signal(signal.SIGALRM, _alarm)
    warnings.simplefilter("ignore")
    yield NOT_BUILT
    try:
        signal.alarm(SECONDS)
        try:
            scene = _scene(entry, folder)
        finally:
            signal.alarm(0)
    except Unbuilt as problem:
        yield Row(entry.name, entry.model_type, NOT_BUILT, IMPOSSIBLE, str(problem))
        return
    except _TooSlow:
        yield Row(entry.name, entry.model_type, NOT_BUILT, IMPOSSIBLE, f"not built in {SECONDS} s")
        return
    except Exception as problem:
        yield Row(entry.name, entry.model_type, NOT_BUILT, IMPOSSIBLE, f"the sweep itself: {line(problem)}")
        return
    for kind, recipe in recipes(scene.base.model):
        if kind not in kinds or kind in done:
            continue
        yield kind
        started = time.monotonic()
        try:
            signal.alarm(SECONDS)
            try:
                row = _case(scene, kind, recipe)
            finally:
                signal.alarm(0)
        except _TooSlow:
            row = Row(entry.name, entry.model_type, kind, CRASH, f"not done in {SECONDS} s")
        except Exception as problem:
            row = Row(entry.name, entry.model_type, kind, CRASH, f"the sweep itself: {line(problem)}")
        yield dataclasses.replace(row, seconds=round(time.monotonic() - started, 2))
        for rest in ("adapter", "merged", "peft"):
            shutil.rmtree(folder / rest, ignore_errors=True)
    size = sum(parameter.numel() for parameter in scene.base.model.parameters())
    asked = scene.question
    how = f"answers to {' '.join(asked.inputs)} in {asked.dtype}" if asked else PARAMETERS_ONLY
    more = f"{size} parameters, {how}"
    yield Row(entry.name, entry.model_type, ALL_DONE, BUILT, more, ", ".join(kinds))


def _scene(entry: Entry, folder: Path) -> _Scene:
    base = saved(entry.name, folder / "base")
    values = {name: value.double() if value.is_floating_point() else value for name, value in state(base.model).items()}
    return _Scene(entry, base, values, judging.question(base.model), folder)


def _case(scene: _Scene, kind: str, recipe: Recipe) -> Row:
    def row(result: str, why: str = "", peft: str = "", forward: bool = False) -> Row:
        return Row(scene.entry.name, scene.entry.model_type, kind, result, why, peft, forward)

    try:
        live = _trained(scene, kind, recipe)
        _save(live, scene.folder / "adapter")
        wanted = judging.truth(live, scene.values, scene.question)
    except Exception as problem:
        return row(IMPOSSIBLE, f"PEFT: {line(problem)}")
    try:
        merge(scene.folder / "adapter", scene.folder / "merged", base=scene.base.folder)
    except FossilExportError as problem:
        peft = _peft(scene, live, wanted)[0]
        unused = _unused(scene, wanted, peft)
        return row(UNUSED, NOT_COMPUTED) if unused else row(REFUSED, _short(str(problem), scene.folder), peft)
    except Exception as problem:
        return row(CRASH, _short(line(problem), scene.folder), _peft(scene, live, wanted)[0])
    ours, wrong = _looked_at(scene, scene.folder / "merged", wanted)
    bits = {name: value.clone() for name, value in state(ours).items()} if ours is not None else {}
    if wrong is None and ours is not None:
        wrong = _answers(ours, wanted)
    elif ours is not None and _is_left_out(scene, wanted, wrong or "") and _answers(ours, wanted) is None:
        return row(UNUSED, NOT_COMPUTED)
    peft, theirs = _peft(scene, live, wanted, (wrong, bits) if bits else None)
    forward = wanted.sensible
    if (wrong is None or judging.ANSWERS_DIFFER in wrong) and _unused(scene, wanted, wrong or ""):
        return row(UNUSED, NOT_COMPUTED)
    if wrong is not None:
        doubt = peft != "right" and judging.unused(scene.base.model, wanted)
        return row(
            WRONG, wrong + ("; but the trainer's values do not give its answers" if doubt else ""), peft, forward
        )
    if peft == "right" and any(not torch.equal(value, bits[name]) for name, value in theirs.items()):
        return row(RIGHT, "rounded otherwise than PEFT", peft, forward)
    return row(EXACT, "", peft, forward)


def _unused(scene: _Scene, wanted: judging.Truth, wrong: str) -> bool:
    """Looked at where the answers ask for it: they are the base's, or differ at equal values."""
    suspicious = not wanted.sensible or judging.ANSWERS_DIFFER in wrong
    return suspicious and judging.unused(scene.base.model, wanted)


def _is_left_out(scene: _Scene, wanted: judging.Truth, wrong: str) -> bool:
    """Whether a value is the base's because the model never calls that layer; the answers have the last word."""
    module = wrong.partition(" ")[0].removesuffix(".weight")
    known = models.bypassed(scene.base.model.config.to_dict())
    return any(f".{module}".endswith(f".{name}") for name in known) or judging.unused(scene.base.model, wanted)


def _trained(scene: _Scene, kind: str, recipe: Recipe) -> Any:
    problem: Exception | None = None
    for rank in (4, 3, 1):  # a layer may be as narrow as that
        model = copy.deepcopy(scene.base.model)
        try:
            live = get_peft_model(model, recipe.config(rank))
        except ValueError as reason:
            problem = problem or reason
            if "less than or equal to in_features" in str(reason):
                continue
            raise
        randomise(live, f"{scene.entry.name} {kind}", size=0.05, trained_only=True)
        return live.eval()
    raise problem or ValueError("no rank")


def _save(live: Any, folder: Path) -> None:
    """PEFT asks for the embedding, to see whether it has grown; some classes have no answer."""
    try:
        live.save_pretrained(folder)
    except NotImplementedError:
        live.save_pretrained(folder, save_embedding_layers=False)


def _looked_at(scene: _Scene, folder: Path, wanted: judging.Truth) -> tuple[Any, str | None]:
    """The class's own model of a folder, and what is wrong with its values."""
    try:
        model, report = type(scene.base.model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as problem:
        return None, f"cannot be loaded: {_short(line(problem), scene.folder)}"
    found = judging.difference(model.eval(), wanted)
    missing = sorted(set(report["missing_keys"]) - scene.base.missing)
    if missing:
        found = f"{missing[0]} is not in the files" + (f"; {found}" if found else "")
    elif found is None and report["mismatched_keys"]:
        found = f"{sorted(report['mismatched_keys'])[0]} does not fit"
    elif found is None and report["unexpected_keys"]:
        found = f"{sorted(report['unexpected_keys'])[0]} is not expected"
    return model, found


def _answers(model: Any, wanted: judging.Truth) -> str | None:
    try:
        return judging.answers_differ(model, wanted)
    except Exception as problem:
        return f"does not run: {line(problem)}"


_Verdict = tuple[str | None, dict[str, torch.Tensor]]


def _peft(scene: _Scene, live: Any, wanted: judging.Truth, ours: _Verdict | None = None) -> tuple[str, dict[str, Any]]:
    """What PEFT's own merge is once it is saved and loaded: its verdict and its values. `live` is used up.

    The same files as `ours` need no second look.
    """
    try:
        live.merge_and_unload().save_pretrained(scene.folder / "peft")
    except Exception as problem:
        return f"cannot: {_short(line(problem), scene.folder)}", {}
    if ours is not None and _same(scene.folder / "merged", scene.folder / "peft"):
        wrong, values = ours
    else:
        model, wrong = _looked_at(scene, scene.folder / "peft", wanted)
        values = {name: value.clone() for name, value in state(model).items()} if model is not None else {}
        if wrong is None:
            wrong = _answers(model, wanted)
    return ("right" if wrong is None else f"wrong: {wrong}"), values


def _same(one: Path, other: Path) -> bool:
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    if configs[0] != configs[1]:
        return False
    first, second = (
        {n: v for file in it.glob("*.safetensors") for n, v in load_file(file).items()} for it in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _short(text: str, folder: Path) -> str:
    return " ".join(text.split()).replace(f"{folder}/", "")[:300]


ALL_KINDS = tuple(KINDS)
