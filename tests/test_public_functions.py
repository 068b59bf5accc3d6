"""The functions and classes that the package offers: what help() says, and what they take."""

from __future__ import annotations

import doctest
import inspect as inspecting
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import public_tools
import pytest
from public_tools import NAMES

import fossil_export
from fossil_export import (
    FossilExportError,
    Progress,
    convert,
    inspect,
    load_adapter,
    merge,
    merge_part,
    plan_merge,
    run_merge,
    verify,
)

made = public_tools.made
FUNCTIONS = [name for name in NAMES if inspecting.isfunction(getattr(fossil_export, name))]
QUICK = {"load_adapter"}
"""Functions that are over at once, and show nothing."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_names_every_parameter_result_and_error(name: str) -> None:
    function = getattr(fossil_export, name)
    text = inspecting.getdoc(function) or ""
    heads = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert heads == ["Args", "Returns", "Raises", "Example"], heads
    told = re.findall(r"^    (\w+): ", text.partition("Args:\n")[2].partition("Returns:\n")[0], re.MULTILINE)
    assert told == list(inspecting.signature(function).parameters)
    examples = doctest.DocTestParser().get_examples(text)
    assert any(f"{name}(" in one.source for one in examples), "the example does not call it"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_whole(name: str) -> None:
    function = getattr(fossil_export, name)
    parameters = inspecting.signature(function).parameters.values()
    assert not [one for one in parameters if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    assert all(one.annotation is not one.empty for one in parameters)
    assert not [one for one in parameters if str(one.annotation) == "Any"]
    if name in QUICK:
        return
    progress = inspecting.signature(function).parameters["progress"]
    assert (progress.annotation, progress.default, progress.kind) == ("Shown", False, progress.KEYWORD_ONLY)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FUNCTIONS])
def test_every_class_says_what_it_is(name: str) -> None:
    kind = getattr(fossil_export, name)
    text = inspecting.getdoc(kind) or ""
    assert text and not text.startswith(f"{name}(")  # which dataclasses say of themselves
    hidden = {"parts", "stamps", "home", "headers", "pickled"}
    fields = getattr(kind, "__dataclass_fields__", {})
    assert [one for one in fields if one not in hidden and not re.search(rf"\b{one}\b", text)] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name: str, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that need no network, cluster or ONNX; of the others the names and arguments are looked at."""
    function = getattr(fossil_export, name)
    for one in doctest.DocTestParser().get_examples(inspecting.getdoc(function) or ""):
        code = compile(one.source, name, "single")
        assert code
        for called, arguments in re.findall(r"fossil_export\.(\w+)\(([^()]*)\)", one.source):
            keywords = re.findall(r"(\w+)=", arguments)
            assert set(keywords) <= inspecting.signature(getattr(fossil_export, called)).parameters.keys()
    for folder in ("base", "adapter"):
        (tmp_path / f"my-{folder}").symlink_to(made / folder)
    (tmp_path / "merged").symlink_to(made / "merged")
    monkeypatch.chdir(tmp_path)
    local = {"convert", "inspect", "load_adapter", "merge", "plan_merge", "run_merge", "settled"}
    scope: dict[str, Any] = {}
    for one in doctest.DocTestParser().get_examples(inspecting.getdoc(function) or "") if name in local else ():
        if "survival[" not in one.source:
            exec(one.source, scope)


def test_types_can_be_asked_for() -> None:
    assert get_type_hints(Progress)["total"] == int | None
    assert (Path(fossil_export.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda made: merge(made / "adapter", 3), "merge: output is 3 (int), expected a path: str or os.PathLike"),
        (lambda made: merge(made / "adapter", made / "x", base=3), "merge: base is 3 (int)"),
        (lambda made: merge(made / "adapter", made / "x", overwrite="no"), "overwrite is 'no' (str), expected True or"),
        (lambda made: merge(made / "adapter", made / "x", max_shard_size=1.5), "max_shard_size is 1.5 (float)"),
        (lambda made: merge(made / "adapter", made / "x", min_survival="x"), "min_survival is 'x' (str)"),
        (lambda made: merge(made / "adapter", made / "x", trained_on=3), "trained_on is 3 (int)"),
        (lambda made: merge(made / "adapter", made / "x", progress=3), "progress is 3, expected True, False or a fun"),
        (lambda made: run_merge("plan", made / "x"), "run_merge: plan is 'plan' (str), expected what plan_merge() ret"),
        (lambda made: merge_part(plan_merge(made / "adapter"), made / "x", 3), "part is 3 (int)"),
        (lambda made: verify(made / "merged", level=3), "verify: level is 3 (int), expected a str"),
        (lambda made: verify(made / "merged", prompts=3), "prompts is 3 (int)"),
        (lambda made: convert(made / "adapter", made / "x", to=[]), "convert: to is [] (list)"),
        (lambda made: convert(made / "adapter", made / "x", to="lora", rank="8"), "rank is '8' (str), expected an int"),
        (lambda made: fossil_export.push(3, "a/b"), "push: folder is 3 (int)"),
        (lambda made: fossil_export.push(made / "merged", 3), "push: repo_id is 3 (int)"),
        (lambda made: fossil_export.publish_certificate(3), "result is 3 (int), expected what verify() returned"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_told_by_name(call: Any, said: str, made: Path) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        call(made)
    assert not (made / "x").exists()


@pytest.mark.parametrize("given", [3, None, b"adapter", [3], {"a": 1}])
def test_what_is_no_adapter_is_told(given: Any, made: Path) -> None:
    for call in (lambda: merge(given, made / "x"), lambda: inspect(given), lambda: load_adapter(given)):
        with pytest.raises(fossil_export.FossilExportError):
            call()


def test_any_path_will_do(made: Path, tmp_path: Path) -> None:
    class Place:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __fspath__(self) -> str:
            return str(self.path)

    result = merge([Place(made / "adapter")], Place(tmp_path / "out"), base=Place(made / "base"))  # type: ignore
    assert result.output == tmp_path / "out"
    assert verify(Place(tmp_path / "out"), level="weights", report=Place(tmp_path / "report.html")).parity  # type: ignore
    assert (tmp_path / "report.html").is_file()


def test_a_path_with_a_zero_character_is_refused_by_name(made: Path) -> None:
    for call in (
        lambda: merge(made / "adapter", "a\0b"),
        lambda: convert(made / "adapter", Path("a\0b"), to="lora"),
        lambda: verify(made / "merged", level="weights", report="a\0b"),
    ):
        with pytest.raises(FossilExportError, match=r"^'a\\x00b': is no usable path"):
            call()


def test_the_notebook_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, as a kernel runs them; it is stored without outputs."""
    cells = json.loads((Path(__file__).parents[1] / "examples" / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 4 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    scope: dict[str, Any] = {}
    for cell in code:
        exec("".join(cell["source"]), scope)
    assert scope["found"].parity and len(scope["result"].survival) == 4
