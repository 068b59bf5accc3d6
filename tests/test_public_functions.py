"""The functions and classes that the package offers: what help() says, how results look, how far a call is."""

from __future__ import annotations

import doctest
import inspect as inspecting
import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import progress_tools
import pytest
from conftest import LoopbackHub, edit_json, make_adapter, make_base, weights
from safetensors.torch import save_file

import fossil_export
from fossil_export import (
    FossilExportError,
    Progress,
    _progress,
    convert,
    finish_merge,
    inspect,
    load_adapter,
    merge,
    merge_part,
    plan_merge,
    run_merge,
    verify,
)
from fossil_export._shown import table
from fossil_export._threads import in_context, in_order
from fossil_export.storage.hub._background import interruptible
from fossil_export.storage.hub._remote import HubFolder

every_slab = progress_tools.every_slab

NAMES = [name for name in fossil_export.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if inspecting.isfunction(getattr(fossil_export, name))]
QUICK = {"load_adapter"}
"""Functions that are over at once, and show nothing."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter for it, and the model merged of both."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "adapter", make_base(folder / "base"))
    merge(folder / "adapter", folder / "merged")
    return folder


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


class Cells(HTMLParser):
    """The tags of a text, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVIL = "<script>alert(1)</script>\x1b[2J"


def shown(made: Path, folder: Path) -> list[Any]:
    """One of each plan and result that needs no network, with a name to fear in each."""
    adapter = folder / f"ad{EVIL.replace('/', '')}"
    make_adapter(adapter, made / "base")
    plan = plan_merge(adapter, made / "base")
    part = merge_part(plan, folder / "parts", (1, 1))
    result = finish_merge(plan, folder / "parts")
    found = [load_adapter(adapter), plan, part, result, inspect(adapter), verify(folder / "parts", level="weights")]
    return [*found, convert(adapter, folder / "lora", to="lora"), fossil_export.plan_onnx(adapter)]


def test_plans_and_results_are_a_line_and_a_harmless_table(made: Path, tmp_path: Path) -> None:
    for one in shown(made, tmp_path):
        assert repr(one) == str(one) and len(repr(one)) < 1000 and repr(one).isprintable(), repr(one)
        assert repr(one).startswith(f"<{type(one).__name__} ")
        cells = Cells(one._repr_html_())
        assert not cells.open and set(cells.tags) <= {"div", "table", "caption", "tbody", "tr", "th", "td", "ul", "li"}
        assert "\x1b" not in one._repr_html_() and len(one._repr_html_()) < 10_000
        assert "color:#" not in one._repr_html_() and "background" not in one._repr_html_()  # light and dark alike
    names = [type(one).__name__ for one in shown(made, tmp_path / "more")]
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.endswith(("Plan", "Result")) or name in ("Adapter", "Verification")]
)
def test_every_result_has_both(name: str) -> None:
    kind = getattr(fossil_export, name)
    assert "_repr_html_" in vars(kind) and "__repr__" in vars(kind) and kind.__repr__.__module__.startswith("fossil")


def test_thousands_of_problems_are_still_short(made: Path, tmp_path: Path) -> None:
    tensors = weights(made / "adapter")
    for values in tensors.values():
        values.view(-1)[0] = float("nan")
    make_adapter(tmp_path / "adapter", made / "base")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    found = inspect(tmp_path / "adapter")
    assert len(found.problems) == 14 and len(repr(found)) < 900
    assert found._repr_html_().count("<li") == 9 and "and 6 more" in found._repr_html_()
    assert len(table("x" * 10**6, [("a", "b" * 10**6)], ["c" * 10**6] * 10**5)) < 5000


def test_an_adapter_of_whole_tensors_alone_can_be_shown(made: Path, tmp_path: Path) -> None:
    adapter = load_adapter(made / "adapter")
    object.__setattr__(adapter, "trained", {})
    assert repr(adapter).startswith("<Adapter ") and "modules" in adapter._repr_html_()


def told_by(call: Any) -> list[Progress]:
    told: list[Progress] = []
    call(told.append)
    return told


@pytest.mark.parametrize("every", [True, False])
def test_each_step_begins_and_ends_and_never_goes_back(
    every: bool, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if every:
        request.getfixturevalue("every_slab")
    calls: dict[str, Any] = {
        "merging": lambda progress: merge(made / "adapter", tmp_path / "out", progress=progress),
        "reading for SHA-256": lambda progress: finish_merge(
            plan_merge(made / "adapter"), tmp_path / "parts", hash=True, progress=progress
        ),
        "comparing": lambda progress: verify(made / "merged", level="weights", progress=progress),
        "measuring the updates": lambda progress: inspect(made / "adapter", progress=progress),
        "writing": lambda progress: convert(made / "adapter", tmp_path / "lora", to="lora", progress=progress),
        "planning": lambda progress: plan_merge(made / "adapter", progress=progress),
    }
    merge_part(plan_merge(made / "adapter"), tmp_path / "parts", (1, 1))
    for step, call in calls.items():
        found = [one for one in told_by(call) if one.step == step and one.total is not None]
        assert found[0].done == 0 and found[-1].done == found[-1].total and found[-1].fraction == 1.0, step
        assert [one.done for one in found] == sorted(one.done for one in found)
        assert len({(one.total, one.unit) for one in found}) == 1


@pytest.mark.usefixtures("every_slab")
def test_a_function_is_called_by_one_thread_at_a_time(made: Path, tmp_path: Path) -> None:
    inside, threads, most = [0], set(), [0]

    def tell(now: Progress) -> None:
        inside[0] += 1
        threads.add(threading.get_ident())
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.002)
        inside[0] -= 1

    merge(made / "adapter", tmp_path / "out", progress=tell)
    assert most == [1] and len(threads) > 1


@pytest.mark.parametrize("problem", [OSError("mine"), ValueError("mine"), KeyboardInterrupt(), StopIteration("mine")])
@pytest.mark.usefixtures("every_slab")
def test_what_the_function_raises_comes_out_and_nothing_is_left(
    problem: BaseException, made: Path, tmp_path: Path
) -> None:
    """An OSError, too, which is no fault of the disk's."""

    def tell(now: Progress) -> None:
        if now.done and now.unit == "B":
            raise problem

    for call in (
        lambda: merge(made / "adapter", tmp_path / "out", progress=tell),
        lambda: verify(made / "merged", level="weights", progress=tell),
    ):
        with pytest.raises(type(problem)) as caught:
            call()
        assert caught.value is problem
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_a_zero_character_is_refused_by_name(made: Path) -> None:
    for call in (
        lambda: merge(made / "adapter", "a\0b"),
        lambda: convert(made / "adapter", Path("a\0b"), to="lora"),
        lambda: verify(made / "merged", level="weights", report="a\0b"),
    ):
        with pytest.raises(FossilExportError, match=r"^'a\\x00b': is no usable path"):
            call()


def test_a_call_within_the_function_is_another_call(made: Path, tmp_path: Path) -> None:
    steps: list[str] = []

    def tell(now: Progress) -> None:
        steps.append(now.step)
        if len(steps) < 50:
            plan_merge(made / "adapter")

    merge(made / "adapter", tmp_path / "out", progress=tell)
    assert len(steps) < 50


def test_a_call_without_progress_is_silent(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    merge(made / "adapter", tmp_path / "out")
    assert capsys.readouterr() == ("", "")
    merge(made / "adapter", tmp_path / "other", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "merging: 100%" in said.err and "B/s" in said.err
    assert not [one for one in recwarn if "tqdm" in str(one.category).lower()]


def test_a_note_is_a_line_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with _progress.showing(True):
        step = _progress.begin("merging", 10, "B")
        _progress.note("a worker is \x1b gone")
        step(10)
    assert "a worker is \\x1b gone\n" in written.getvalue() and "merging: 100%" in written.getvalue()


def test_a_thread_tells_what_happened_to_the_call_that_it_works_for_and_no_other() -> None:
    told: list[Progress] = []
    with _progress.showing(told.append):
        _progress.begin("fetching", 10, "B")
        for run in (in_context(_progress.note), _progress.note):  # the second one is of some other call
            thread = threading.Thread(target=run, args=(f"note {len(told)}",))
            thread.start()
            thread.join()
    assert told[1:] == [Progress("fetching", 0, 10, "B", "note 1")]
    _progress.note("nobody is told")


def test_headers_and_downloads_from_the_hub_tell_their_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HubFolder("ada/base", "0" * 40, {})
    monkeypatch.setattr(folder, "_header", _progress.note)
    told: list[Progress] = []
    with _progress.showing(told.append), ThreadPoolExecutor(2) as pool:
        folder.headers(["a header"])
        interruptible(lambda: _progress.note("a download"))
        list(in_order(pool, [lambda: _progress.note("a block")], ahead=1))
    assert [one.note for one in told] == ["a header", "a download", "a block"]


def test_a_fetch_from_the_hub_is_a_step(hosted: LoopbackHub, tmp_path: Path) -> None:
    told = told_by(lambda progress: merge("ada/adapter", tmp_path / "out", progress=progress))
    fetched = [one for one in told if one.step.startswith("fetching ") and one.unit == "B"]
    assert any("model-0" in one.step for one in fetched)
    for step in {one.step for one in fetched}:
        last = [one for one in fetched if one.step == step][-1]
        assert last.done == last.total, last
    steps = progress_tools.steps_of(told)
    assert steps.index("planning") < max(map(steps.index, {one.step for one in fetched})) < steps.index("merging")


def test_the_notebook_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, as a kernel runs them; it is stored without outputs."""
    cells = json.loads((Path(__file__).parents[1] / "examples" / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 4 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    scope: dict[str, Any] = {}
    for cell in code:
        exec("".join(cell["source"]), scope)
    assert scope["found"].parity and len(scope["result"].survival) == 4


def test_edited_config_is_shown_in_the_plan(made: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", made / "base")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(made / "base"))
    assert "dtype = bfloat16" in plan_merge(tmp_path / "adapter", dtype="bfloat16")._repr_html_()
