"""The reference of the Python interface in docs/python.md, made from signatures and docstrings.

`python -m making.reference` writes the made part of the page anew; with --check it says whether it is up to date.
What is imported is `fossil_export` alone: PyTorch, transformers and ONNX need not be installed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from making.commands import prose, write
from making.links import ROOT

PAGE = ROOT / "docs" / "python.md"
GROUPS: dict[str, tuple[str, ...]] = {
    "Look at an adapter": ("load_adapter", "inspect", "Adapter", "Inspection"),
    "Merge": ("merge", "plan_merge", "run_merge", "settled", "MergePlan", "MergeResult"),
    "Merge in parts": ("merge_part", "finish_merge", "merge_on_ray", "PartResult"),
    "Verify": ("verify", "Verification"),
    "ONNX": ("export_onnx", "plan_onnx", "run_onnx", "OnnxPlan", "OnnxResult"),
    "Convert": ("convert", "Conversion"),
    "Publish": ("push", "plan_push", "run_push", "publish_certificate", "PushPlan", "PushResult"),
    "Merge and publish, file by file": ("merge_to_hub", "plan_stream", "run_stream", "StreamPlan", "StreamResult"),
    "Progress": ("Progress",),
}
"""By task, every name that `fossil_export` offers."""

OTHERS = ("FossilExportError", "__version__")
"""Names that have their place elsewhere on the page."""

WIDTH = 100


def reference() -> str:
    """Each group with its functions and classes, then the errors."""
    import fossil_export

    placed = {*OTHERS, *(name for names in GROUPS.values() for name in names)}
    rest = tuple(sorted(set(dir(fossil_export)) - placed))
    parts = []
    for title, names in {**GROUPS, **({"Others": rest} if rest else {})}.items():
        parts.append(f"## {title}")
        parts += [part for name in names for part in _described(name, getattr(fossil_export, name))]
    parts += ["## Errors", *_errors(), "## Version", f"`fossil_export.__version__`, now `{fossil_export.__version__}`."]
    return "\n\n".join(parts)


def _described(name: str, thing: Any) -> Iterator[str]:
    yield f"### {name}"
    if inspect.isclass(thing):
        yield from _class(thing)
    else:
        yield f"```py\n{signature(name, thing)}\n```"
        yield from docstring(thing)


def signature(name: str, thing: Any) -> str:
    """The signature as it would be typed, on one line or a line an argument."""
    found = inspect.signature(thing)
    shown = [_argument(argument) for argument in found.parameters.values()]
    kinds = [argument.kind for argument in found.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    back = "" if found.return_annotation is inspect.Signature.empty else f" -> {_type(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){back}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){back}"


def _argument(argument: inspect.Parameter) -> str:
    kind = argument.kind
    stars = "*" if kind is argument.VAR_POSITIONAL else "**" if kind is argument.VAR_KEYWORD else ""
    shown = stars + argument.name
    has_type = argument.annotation is not inspect.Parameter.empty
    if has_type:
        shown += f": {_type(argument.annotation)}"
    if argument.default is not inspect.Parameter.empty:
        default = json.dumps(argument.default) if isinstance(argument.default, str) else repr(argument.default)
        shown += f"{' = ' if has_type else '='}{'...' if '<' in default else default}"  # a function has no short form
    return shown


def _type(annotation: Any) -> str:
    return str(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def docstring(thing: Any) -> Iterator[str]:
    """A docstring's paragraphs as Markdown: examples become code, sections ("Raises:") lists."""
    for paragraph in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
        lines = paragraph.splitlines()
        if paragraph.lstrip().startswith(">>>"):
            yield _code(paragraph)
        elif re.fullmatch(r"[A-Z]\w*( \w+)?:", lines[0]) and all(line[:1] == " " for line in lines[1:]) and lines[1:]:
            below = textwrap.dedent("\n".join(lines[1:]))
            yield f"**{lines[0].replace('Args', 'Arguments')}**"
            yield _code(below) if below.startswith(">>>") else _entries(below)
        elif re.match(r"\s*([-*]|\d+\.) ", paragraph) or paragraph.lstrip().startswith(("|", "```")):
            yield textwrap.dedent(paragraph)
        elif paragraph.strip():
            yield prose(" ".join(paragraph.split()))


def _code(text: str) -> str:
    return f"```pycon\n{re.sub(r' *# doctest:.*', '', textwrap.dedent(text))}\n```"


def _entries(text: str) -> str:
    """The "name: what it is" of a section, one a line, the lines below it being indented."""
    entries: list[str] = []
    for line in text.splitlines():
        if line[:1].isspace() and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(re.sub(r"^([\w.*, ]+?)( \([^)]*\))?:", r"`\1`\2:", line, count=1))
    return "\n".join(f"- {prose(entry)}" for entry in entries)


def _class(thing: type) -> Iterator[str]:
    yield from docstring(thing)
    fields = list(_fields(thing))
    if any(said for _, _, said in fields):
        rows = [f"| `{name}` | `{_cell(kind)}` | {prose(said, is_cell=True)} |" for name, kind, said in fields]
        yield "\n".join(["| field | type | |", "|---|---|---|", *rows])
    elif fields:
        yield "\n".join(
            ["| field | type |", "|---|---|", *(f"| `{name}` | `{_cell(kind)}` |" for name, kind, _ in fields)]
        )
    if members := list(_members(thing)):
        yield "\n".join(f"- {member}" for member in members)


def _members(thing: type) -> Iterator[str]:
    """Each public property and method on one line."""
    for name, member in vars(thing).items():
        if name.startswith("_") or isinstance(member, type):
            continue
        what = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, property) or _is_cached(member):
            getter = member.fget if isinstance(member, property) else member.func
            kind = f": {_type(getter.__annotations__['return'])}" if "return" in getter.__annotations__ else ""
            yield f"`{name}{kind}`{_said(getter)}"
        elif inspect.isfunction(what):
            found = inspect.signature(what)
            kept = [part for at, part in enumerate(found.parameters.values()) if at or isinstance(member, staticmethod)]
            yield f"`{_one_line(name, found.replace(parameters=kept))}`{_said(what)}"


def _one_line(name: str, found: inspect.Signature) -> str:
    arguments = ", ".join(_argument(part) for part in found.parameters.values())
    return f"{name}({arguments})" + (
        "" if found.return_annotation is inspect.Signature.empty else f" -> {_type(found.return_annotation)}"
    )


def _said(thing: Any) -> str:
    said = " ".join((inspect.getdoc(thing) or "").split())
    return f" – {prose(said)}" if said else ""


def _is_cached(member: Any) -> bool:
    return type(member).__name__ == "cached_property"


def _fields(thing: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, docstring below it) of each field of a dataclass."""
    if not dataclasses.is_dataclass(thing):
        return
    said: dict[str, str] = {}
    for kind in reversed(thing.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    said[name] = " ".join(text.split())
    for each in dataclasses.fields(thing):
        if not each.name.startswith("_"):
            yield each.name, _type(each.type), said.get(each.name, "")


def _errors() -> Iterator[str]:
    from fossil_export import errors

    yield "From `fossil_export.errors`. Every message is one line: the file, what is wrong with it, and what to do."
    rows = ["| error | |", "|---|---|"]
    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == errors.__name__:
            above = [kind.__name__ for kind in thing.__mro__[1:] if issubclass(kind, errors.FossilExportError)]
            said = " ".join((inspect.getdoc(thing) or "").split())
            rows.append(f"| `{name}` | {prose(said, is_cell=True)}{f' A `{above[0]}`.' if above[:-1] else ''} |")
    yield "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(write(PAGE, reference(), "make docs-python", "--check" in sys.argv[1:]))
