"""The names in a checkpoint and the parameters of a class, held side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from fossil_export.models._architecture import Architecture, Operation, Rule
from fossil_export.models._rules import Passes, Rules


@dataclass
class Conversion:
    """Tensors of a file that become parameters by operations: `stored` are their names by the number of the source
    pattern, in order; `key` is the name of the first parameter."""

    rule: Rule
    key: str
    stored: dict[int, list[str]] = field(default_factory=dict)

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.rule.operations

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the operations give, by name: one for each target pattern."""
        targets = self.rule.targets
        if any("*" in target for target in targets):
            return (self.key,)
        full = self.key.replace("*.", "0.")
        at = full.find(targets[0])
        if at < 0:
            return (self.key,)
        return tuple(full[:at] + target + full[at + len(targets[0]) :] for target in targets)


class Names:
    """Where each parameter of a class lies in a checkpoint that holds tensors of names `stored`.

    `whole` is the stored name of each parameter that is one tensor, `converted` the conversion of each that is not;
    `strangers` are stored names that the class does not know, `twice` those of parameters that another one is already.
    `passes` are those over these names by the rules of other classes.
    """

    def __init__(self, model: Architecture, stored: Iterable[str], passes: Passes | None = None) -> None:
        self.model = model
        self.whole: dict[str, str] = {}
        self.converted: dict[str, Conversion] = {}
        self.strangers: list[str] = []
        self.twice: list[str] = []
        self._pass = (passes or Passes()).of(model.rules, stored)
        conversions: dict[str, Conversion] = {}
        for name, renamed, rule, source in self._pass.renamed:
            parameter = self._rooted(renamed)
            if not model.has(parameter) and model.has(name):
                parameter, rule = self._rooted(name), None  # it should not have been renamed
            if rule is None:
                if model.has(parameter):
                    if self.whole.setdefault(parameter, name) != name:
                        self.twice.append(name)
                else:
                    self.strangers.append(name)
            else:
                made = conversions.setdefault(parameter, Conversion(rule, parameter))
                made.stored.setdefault(source, []).append(name)
        for made in conversions.values():
            if not any(model.has(parameter) for parameter in made.parameters):
                self.strangers += [name for names in made.stored.values() for name in names]
            for parameter in made.parameters:
                self.converted[parameter] = made
        if passes is None:
            self._pass.clear()

    @cached_property
    def _back(self) -> Rules:
        return Rules(self._pass.used, back=True)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.whole or parameter in self.converted

    @cached_property
    def modules(self) -> frozenset[str]:
        """The names of all parameters and of the modules they lie in; "" too."""
        names = [*self.whole, *self.converted]
        return frozenset({"", *names, *(name[:at] for name in names for at, one in enumerate(name) if one == ".")})

    def holds(self, parameter: str) -> bool:
        """Whether the checkpoint has a parameter, or another one that it is tied to."""
        pairs = ((tie.target, tie.source) for tie in self.model.ties if tie.on)
        return parameter in self or any(parameter in pair and (pair[0] in self or pair[1] in self) for pair in pairs)

    def parameter(self, name: str) -> str | None:
        """The parameter that `name` means: in the class itself, or as a file of it would spell it; None if neither."""
        if self.model.has(name):
            return name
        for known in (self._rooted(name), self._rooted(self._renamed(name))):
            if self.model.has(known):
                return known
        return None

    def spelling(self, parameter: str) -> str | None:
        """The name to store a parameter by that the checkpoint lacks: as transformers would save it there, if the class
        reads that back; None if it cannot be stored by a name of its own."""
        saved, converter, _ = self._back.rename_alone(parameter)
        candidates = [saved] if converter is None else []
        root = f"{self.model.prefix}."
        if self.model.prefix and not any(name.startswith(root) for name in self.whole.values()):
            candidates += [name.removeprefix(root) for name in (*candidates, parameter)]
        for name in (*candidates, parameter):
            if self._read_as(name) == parameter:
                return name
        return None

    def _read_as(self, name: str) -> str | None:
        found, converted = self._pass.alone(name)
        found = self._rooted(found)
        if not self.model.has(found) and self.model.has(name):
            return self._rooted(name)
        return None if converted else found

    def _renamed(self, name: str) -> str:
        found, converted = self._pass.alone(name)
        return name if converted else found

    def _rooted(self, name: str) -> str:
        """With or without the name of the base model, as the class has it."""
        prefix = self.model.prefix
        if not prefix:
            return name
        if name.startswith(prefix):
            bare = re.sub(f"^{prefix}.", "", name, count=1)
            if self.model.has(bare):
                return bare
        rooted = f"{prefix}.{name}"
        return rooted if self.model.has(rooted) else name
