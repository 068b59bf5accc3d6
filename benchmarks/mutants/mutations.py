"""Every small change of one place in a source file that a test ought to notice.

Not made: changes of words (strings, what is inside a `raise`), of annotations and of decorators.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_BINARY: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.Pow: ("**", "*"),
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_METHODS = {"startswith": "endswith", "endswith": "startswith", "append": "count"}


@dataclass(frozen=True)
class Mutation:
    """`old`, from byte `start` on, becomes `new`. `lines` are those of the statement, or of its head; `imported` if it
    runs when the module is imported, whatever a test does."""

    start: int
    old: str
    new: str
    line: int
    lines: tuple[int, int]
    imported: bool

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.start + len(self.old.encode()) :]


def mutations(source: bytes) -> list[Mutation]:
    """All of them, of which a few do not compile."""
    return sorted(_Finder(source).run(), key=lambda one: (one.start, one.new))


def compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


class _Finder:
    def __init__(self, source: bytes) -> None:
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def run(self) -> Iterator[Mutation]:
        for statement in ast.parse(self._source).body:
            yield from self._statement(statement, True)

    def _statement(self, node: ast.stmt, imported: bool) -> Iterator[Mutation]:
        """`imported`: outside of functions."""
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        body = getattr(node, "body", None)
        last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
        lines = node.lineno, last
        if isinstance(node, ast.FunctionDef):
            inner = node.body[0].lineno, node.end_lineno or node.lineno
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                yield from self._expression(default, inner, imported)
        elif isinstance(node, ast.Raise):
            yield self._whole(node, "pass", lines, imported)
        elif isinstance(node, ast.Break | ast.Continue):
            yield self._whole(node, "break" if isinstance(node, ast.Continue) else "continue", lines, imported)
        elif not isinstance(node, ast.ClassDef):
            yield from self._simple(node, lines, imported)
        within = imported and not isinstance(node, ast.FunctionDef)
        for child in ast.walk(node):
            for field in ("body", "orelse", "finalbody"):
                if child is node or (isinstance(child, ast.ExceptHandler | ast.match_case) and child in _parts(node)):
                    for statement in getattr(child, field, []):
                        if isinstance(statement, ast.stmt):
                            yield from self._statement(statement, within)

    def _simple(self, node: ast.stmt, lines: tuple[int, int], imported: bool) -> Iterator[Mutation]:
        if isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant):
                return  # a docstring
            if isinstance(node.value, ast.Call):
                yield self._whole(node, "pass", lines, imported)
        if isinstance(node, ast.Return) and node.value is not None and not _is(node.value, None):
            yield self._whole(node.value, "None", lines, imported)
        if isinstance(node, ast.If | ast.While):
            yield from self._condition(node.test, lines, imported)
        if isinstance(node, ast.AugAssign) and type(node.op) in _BINARY:
            old, new = _BINARY[type(node.op)]
            yield from self._between(node.target, node.value, old + "=", new + "=", lines, imported)
        for name, value in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody", "handlers", "annotation", "cases", "target", "targets"):
                continue
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    yield from self._expression(one, lines, imported)

    def _expression(self, node: ast.AST, lines: tuple[int, int], imported: bool) -> Iterator[Mutation]:
        if isinstance(node, ast.JoinedStr):
            return  # words, whose places Python tells from 3.12 on
        if isinstance(node, ast.IfExp):
            yield from self._condition(node.test, lines, imported)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield self._whole(test, "True", lines, imported)
        elif isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from self._between(left, right, *_COMPARE[type(operator)], lines, imported)
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for first, second in zip(node.values, node.values[1:], strict=False):
                yield from self._between(first, second, old, new, lines, imported)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self._at(self._start(node), "not ", "", lines, imported)
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            yield from self._between(node.left, node.right, *_BINARY[type(node.op)], lines, imported)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield self._whole(node, str(not node.value), lines, imported)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield self._whole(node, repr(node.value + 1), lines, imported)
            if node.value:
                yield self._whole(node, repr(node.value - 1), lines, imported)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
                yield self._whole(node.func, _CALLS[node.func.id], lines, imported)
            if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
                start = self._end(node.func) - len(node.func.attr)
                yield self._at(start, node.func.attr, _METHODS[node.func.attr], lines, imported)
        for child in ast.iter_child_nodes(node):
            yield from self._expression(child, lines, imported)

    def _condition(self, test: ast.expr, lines: tuple[int, int], imported: bool) -> Iterator[Mutation]:
        for new in ("True", "False"):
            if not _is(test, new == "True"):
                yield self._whole(test, new, lines, imported)

    def _between(
        self, left: ast.expr, right: ast.expr, old: str, new: str, lines: tuple[int, int], imported: bool
    ) -> Iterator[Mutation]:
        start, stop = self._end(left), self._start(right)
        at = self._source[start:stop].find(old.encode())
        if at >= 0:
            yield self._at(start + at, old, new, lines, imported)

    def _whole(self, node: ast.expr | ast.stmt, new: str, lines: tuple[int, int], imported: bool) -> Mutation:
        start, stop = self._start(node), self._end(node)
        return self._at(start, self._source[start:stop].decode(), new, lines, imported)

    def _at(self, start: int, old: str, new: str, lines: tuple[int, int], imported: bool) -> Mutation:
        return Mutation(start, old, new, self._source.count(b"\n", 0, start) + 1, lines, imported)

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._starts[node.end_lineno - 1] + node.end_col_offset


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _parts(node: ast.stmt) -> list[ast.AST]:
    return [*getattr(node, "handlers", []), *getattr(node, "cases", [])]
