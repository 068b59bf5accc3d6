"""Which class of transformers an adapter was trained in, and which parameter each of its tensors is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fossil_export import models
from fossil_export._log import log
from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.models import Architecture, Names, Passes

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# What PEFT's task types are trained in.

_AROUND = ("model.language_model.", "language_model.model.", "language_model.")
# What models of several parts call their text model, in transformers of today and before.


_PASSES = "passes over the names"
# Among what was found out about a base, while classes are tried one after another.


@dataclass(frozen=True)
class Naming:
    """The parameters of the class an adapter was trained in, and where the base has them.

    `known` says that transformers has the class; if not, each tensor of the base is a parameter of the same name.
    With `inner` the adapter was trained in the text model alone, which is the `part` of that name here; with `around`
    in a model that has this one's as a part of that name.
    """

    names: Names
    known: bool = True
    inner: Architecture | None = None
    part: str = ""
    around: str = ""

    @property
    def model(self) -> Architecture:
        return self.names.model

    def is_named_by(self, config: Mapping[str, Any] | None) -> bool:
        """Whether a config names this class as its own."""
        return self.known and self.model.name in ((config or {}).get("architectures") or ())

    def parameter(self, name: str) -> str | None:
        """The parameter that the adapter calls `name`; None if the class has none."""
        if self.inner is not None:
            return self._outer(name, self.inner)
        return self.names.parameter(name.removeprefix(self.around))

    def _outer(self, name: str, inner: Architecture) -> str | None:
        module, _, last = name.rpartition(".")
        if inner.head is not None and module == inner.head and self.model.head is not None:
            found = f"{self.model.head}.{last}"
        else:
            root = f"{inner.prefix}."
            bare = name.removeprefix(root) if inner.prefix and inner.has(name) else name
            found = f"{self.part}.{bare}"
        return found if self.model.has(found) else None


def naming_of(adapter: Adapter, base: Checkpoint) -> Naming:
    """The class that has all modules of `adapter`, as well as the base's config and the adapter's tell.

    Of classes that lack some, the one that has most.
    """
    base.found[_PASSES] = Passes()
    try:
        found = _likeliest(adapter, base)
        if (told := f"told {adapter.name}") not in base.found:  # once
            base.found[told] = True
            rules = f"those of {found.model.name} in transformers" if found.known else "as the base's files name them"
            log.info("%s: names of modules are %s", adapter.name, rules)
        return found
    finally:
        base.found.pop(_PASSES).clear()


def _likeliest(adapter: Adapter, base: Checkpoint) -> Naming:
    config = base.config or {}
    wanted = [*(one.parameter for one in adapter.trained.values()), *adapter.saved]
    best: tuple[int, Naming] | None = None
    for exact in (False, True):
        for name in dict.fromkeys(_candidates(adapter, config, exact)):
            for naming in _namings(name, config, base, exact):
                if naming.around and not any(one.startswith(naming.around) for one in wanted):
                    continue  # the same as the class alone
                missing = _missing(naming, wanted, best[0] if best is not None else len(wanted) + 1)
                if missing is None:
                    continue
                best = missing, naming
                if not missing:
                    return _exactly(naming, base)
    return best[1] if best is not None else _unknown(base)


def _missing(naming: Naming, wanted: Sequence[str], best: int) -> int | None:
    """How many of `wanted` the class lacks; None if they are not fewer than the `best`."""
    missing = 0
    for one in wanted:
        if naming.parameter(one) is None:
            missing += 1
            if missing >= best:
                return None
    return missing if missing < best else None


def _exactly(naming: Naming, base: Checkpoint) -> Naming:
    """The same, with the shapes of the class, if the table has ties in it that only its parameters tell apart, or that
    the base's tensors deny."""
    unsure = naming.model.unsure or denies_ties(naming.names, base)
    exact = names_in(naming.model.name, base, True) if unsure else None
    return replace(naming, names=exact) if exact is not None else naming


def denies_ties(names: Names, base: Checkpoint) -> bool:
    """Whether `base` speaks against the ties of a class: tied parameters are stored in several shapes, or several of
    them without the one that they follow. Some configs (Marian's, of two vocabularies) tie others than the table has.
    """
    groups: dict[str, list[str]] = {}
    for tie in names.model.ties:
        if tie.on:
            groups.setdefault(tie.source, [tie.source]).append(tie.target)
    for source, members in groups.items():
        stored = [names.whole[member] for member in members if member in names.whole]
        if len({base.tensors[name].shape for name in stored}) > 1 or (source not in names and len(stored) > 1):
            return True
    return False


def _namings(name: str, config: Mapping[str, Any], base: Checkpoint, exact: bool) -> Iterator[Naming]:
    """The class `name` of the base's own type, then its text model alone."""
    found = names_in(name, base, exact)
    if found is None:
        return
    yield Naming(found)
    yield from (Naming(found, around=part) for part in _AROUND)
    for part, (key, _) in found.model.parts.items():
        text = config.get(key)
        if key != "text_config" or not isinstance(text, dict):
            continue
        for inner_name in dict.fromkeys(models.classes(text, exact=exact).values()):
            inner = models.architecture(text, inner_name, exact=exact)
            if inner is not None:
                yield Naming(found, inner=inner, part=part)


def names_in(name: str, base: Checkpoint, exact: bool) -> Names | None:
    """Where `base` has the parameters of class `name`; None if that is no known class, or no name at all."""
    key = f"names {name} {exact}"
    if key not in base.found:
        model = models.architecture(base.config or {}, name, exact=exact)
        passes = base.found.get(_PASSES)
        base.found[key] = Names(model, base.tensors, passes) if model is not None else None
    found: Names | None = base.found[key]
    return found


def exact_names(name: str, base: Checkpoint) -> Names | None:
    """The same from the installed transformers, which knows the shapes; None if it has not this class."""
    return names_in(name, base, True)


def _candidates(adapter: Adapter, config: Mapping[str, Any], exact: bool) -> Iterator[str]:
    """Names of classes, the likeliest first."""
    trained_in = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    if isinstance(trained_in, str):
        yield trained_in
    by_auto = models.classes(config, exact=exact)
    task = _AUTO.get(str(adapter.config.get("task_type")))
    if task is not None and task in by_auto:
        yield by_auto[task]
    yield from (name for name in config.get("architectures") or () if isinstance(name, str))
    if "AutoModel" in by_auto:
        yield by_auto["AutoModel"]
    yield from by_auto.values()


def _unknown(base: Checkpoint) -> Naming:
    model = Architecture("", "", frozenset(), shapes={name: info.shape for name, info in base.tensors.items()})
    return Naming(Names(model, base.tensors), known=False)
