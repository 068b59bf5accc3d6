"""The conversion rules of transformers, applied to names.

Source: `WeightTransform` and its classes, `rename_source_key` and `revert_weight_conversion` in
transformers/core_model_loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field

from fossil_export.models._architecture import Rule

_BOUNDED = re.compile(r"[a-zA-Z0-9]$")
_BACKREFERENCE = re.compile(r"\\(\d+)")


class Renamer:
    """One rule, ready to be applied. A group of renames begins with its first name, so a renamer is for one pass over
    names in their natural order (`natural`)."""

    def __init__(self, rule: Rule, sources: Sequence[str], targets: Sequence[str], offset: int) -> None:
        self.rule = rule
        self.sources, self.targets = sources, targets
        self.used = False
        self._offset = offset
        self._begun = False
        branches = []
        for number, source in sorted(enumerate(sources), key=lambda entry: -len(entry[1])):
            pattern = source.replace("*.", r".*\.")
            branches.append(f"(?P<g{number}>{pattern}{_END if _BOUNDED.search(pattern) else ''})")
        self._pattern = re.compile("|".join(branches))
        root = f"{rule.root}." if rule.root else ""
        scope = f"{rule.scope}." if rule.scope else ""
        self._prefixes = (root + scope, scope) if rule.scope is not None else ("",)

    def begin(self) -> None:
        """Another pass over names."""
        self._begun = False

    def rename(self, name: str) -> tuple[str, int | None]:
        """The new name, and which of the sources matched (None: none did)."""
        prefix = ""
        if self.rule.scope is not None:
            found = next((one for one in self._prefixes if name.startswith(one)), None)
            if found is None:
                return name, None
            prefix = found
        rest = name[len(prefix) :]
        match = self._pattern.search(rest)
        if match is None:
            return name, None
        group = next(group for group, value in match.groupdict().items() if value is not None)
        number, start = int(group[1:]), self._pattern.groupindex[group]
        target = self.targets[0]
        if self.rule.kind == "GroupWeightRename":
            self._begun |= number == 0
            if not self._begun:
                return name, None
            target = _BACKREFERENCE.sub(lambda found: match.group(start + int(found[1])) or "", self.targets[number])
        elif self._offset:
            target = target.replace(r"\1", str(int(match.group(start + 1)) + self._offset))
        elif r"\1" in target:
            target = target.replace(r"\1", match.group(start + 1))
        self.used = True
        return prefix + rest.replace(match.group(0), target, 1), number


_END = r"(?!\w)"


class Rules:
    """All rules of a class, for one pass over the names of a file (or, `back`, over those of a model)."""

    def __init__(self, rules: Iterable[Rule], back: bool = False) -> None:
        self.all = [_renamer(rule, back) for rule in rules]
        if back:
            self.all.reverse()
        self._renamings = [one for one in self.all if one.rule.kind != "WeightConverter"]
        self._converters = [one for one in self.all if one.rule.kind == "WeightConverter"]
        self._groups = [one for one in self.all if one.rule.kind == "GroupWeightRename"]
        self._back = back

    def __bool__(self) -> bool:
        return bool(self.all)

    def rename(self, name: str) -> tuple[str, Renamer | None, int]:
        """The name after all rules, with the converter among them and its source that matched."""
        if not self._back:
            for renaming in self._renamings:
                name, _ = renaming.rename(name)
        name, converter, source = self._convert(name)
        if self._back:
            for renaming in self._renamings:
                name, _ = renaming.rename(name)
        return name, converter, source

    def rename_alone(self, name: str) -> tuple[str, Renamer | None, int]:
        """The same for a name that is the only one of its pass."""
        for one in self._groups:
            one.begin()
        return self.rename(name)

    def _convert(self, name: str) -> tuple[str, Renamer | None, int]:
        for converter in self._converters:
            renamed, source = converter.rename(name)
            if source is not None:
                return renamed, converter, source
        return name, None, 0

    @property
    def used(self) -> tuple[Rule, ...]:
        """The rules that matched a name so far, in the order of the class."""
        found = [one.rule for one in self.all if one.used]
        return tuple(reversed(found)) if self._back else tuple(found)


@dataclass
class Pass:
    """What rules make of the names `stored` of a file: `renamed` has for each its new name, the rule of the converter
    that matched, and which source did; `used` are the rules that matched one."""

    rules: tuple[Rule, ...]
    stored: InitVar[Iterable[str]]
    renamed: list[tuple[str, str, Rule | None, int]] = field(init=False)
    used: tuple[Rule, ...] = field(init=False)

    def __post_init__(self, stored: Iterable[str]) -> None:
        rules = Rules(self.rules)
        self.renamed = []
        for name in sorted(stored, key=natural) if self.rules else stored:
            parameter, converter, source = rules.rename(name)
            # A name that stays is the same object, for the memory of it.
            parameter = name if parameter == name else parameter
            self.renamed.append((name, parameter, converter.rule if converter is not None else None, source))
        self.used = rules.used
        self._alone = rules
        self._found: dict[str, tuple[str, bool]] = {}

    def alone(self, name: str) -> tuple[str, bool]:
        """A name by itself after the rules, and whether a converter is among them."""
        if name not in self._found:
            parameter, converter, _ = self._alone.rename_alone(name)
            self._found[name] = parameter, converter is not None
        return self._found[name]

    def clear(self) -> None:
        """Let go what only other classes would ask for."""
        self.renamed, self._found = [], {}


class Passes:
    """Those over the names of one file by the rules of several classes, which mostly have the same."""

    def __init__(self) -> None:
        self._made: list[Pass] = []

    def of(self, rules: tuple[Rule, ...], stored: Iterable[str]) -> Pass:
        for one in self._made:
            if one.rules == rules:
                return one
        self._made.append(Pass(rules, stored))
        return self._made[-1]

    def clear(self) -> None:
        for one in self._made:
            one.clear()
        self._made = []


def _renamer(rule: Rule, back: bool) -> Renamer:
    if back:
        return Renamer(rule, *rule.back, -rule.offset)
    return Renamer(rule, rule.sources, rule.targets, rule.offset)


def natural(name: str) -> list[tuple[int, int | str, int]]:
    """A key that sorts names with their numbers by size, as transformers does before it renames."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        if not text and part:
            key.append((0, int(part), -1))
        else:
            key.append((1, text, int(part[len(text) :] or -1)))
    return key
