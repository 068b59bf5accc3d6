"""Write the table of architectures from the installed transformers: `python -m fossil_export.models.make_table`.

With `--check` nothing is written, and it fails if another table would be.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fossil_export.models import _lines, _names, _survey, _table, _traits
from fossil_export.models._architecture import pattern_of

HERE = Path(__file__).with_name(_lines.FILE)


def table(model_types: Iterable[str] | None = None, workers: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
    """The rows of the table by their key, and what was left out and why; all model types, or those given."""
    from transformers import CONFIG_MAPPING

    wanted = sorted(CONFIG_MAPPING.keys() if model_types is None else model_types)
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            surveys = pool.map(survey, wanted, chunksize=4)
    else:
        surveys = list(map(survey, wanted))
    found = _survey.merge(dict(zip(wanted, surveys, strict=True)))
    return {"made of": _made_of(), **_rows(found), **rules()}, dict(sorted(found.left_out.items()))


def survey(model_type: str) -> _survey.Survey:
    """What the classes of a model type are."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    found = _survey.Survey()
    _survey.survey(model_type, found)
    return found


_KEYS = ("auto", "classes", "of", "parts", "prefix", "scales", "spelled", "ties")


def _made_of() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _rows(found: _survey.Survey) -> dict[str, Any]:
    from fossil_export.models._transformers import classes

    rows: dict[str, Any] = {}
    for (model_type, name), record in sorted(found.records.items()):
        row = rows.setdefault(model_type, {"classes": {}, "parts": {}})
        row["classes"][name] = _record(record, model_type, found)
        row["parts"].update(
            {one.key: one.model_type for one in record.inside.values() if one.key and not one.key.startswith("=")}
        )
    for model_type, row in rows.items():
        autos = {auto: name for auto, name in classes(model_type).items() if _known(model_type, name, found)}
        row["auto"] = _lines.short_autos(autos) if autos else []
        row["of"] = found.of.get(model_type, {})
        for path in {**row["parts"], **dict.fromkeys(row["of"].values(), "")}:
            usual = _part_type(model_type, path)
            if usual and usual != model_type:  # a config may give a part its own type's name
                row["parts"][path] = usual
        row["parts"] = dict(sorted(row["parts"].items()))
        prefixes = [record["prefix"] for record in row["classes"].values()]
        row["prefix"] = max(sorted(set(prefixes)), key=prefixes.count)
        for record in row["classes"].values():
            if record["prefix"] == row["prefix"]:
                del record["prefix"]
        row["ties"] = found.ties.get(model_type) or _usual(model_type)
        row["scales"] = model_type in found.scales
        row["spelled"] = found.spelled.get(model_type)
        rows[model_type] = {key: row[key] for key in _KEYS if row[key]}
    return dict(sorted(rows.items()))


def _known(model_type: str, name: str, found: _survey.Survey) -> bool:
    record = found.records.get((model_type, name))
    return (record is not None and record.whole) or name in found.of.get(model_type, {})


def _part_type(model_type: str, path: str) -> str | None:
    """The model type of a part that the config does not give; None if there is none by default."""
    from fossil_export.models import _configs

    try:
        part = _configs.at(_configs.make({"model_type": model_type}), tuple(path.split(".")))
        return str(part.model_type or type(part).__name__)
    except Exception:  # a type of parts only
        return None


def _usual(model_type: str) -> dict[str, Any]:
    """Whether a type that ties nothing itself says that it ties: a composite may take that over."""
    from fossil_export.models import _configs

    try:
        on = bool(getattr(_configs.make({"model_type": model_type}), _configs.TIE, False))
    except Exception:  # a type of parts only
        return {}
    return {"": [on, [_configs.TIE, on]]} if on else {}


def _record(record: _survey.Record, model_type: str, found: _survey.Survey) -> dict[str, Any]:
    inside: list[list[Any]] = []
    children = {}
    names = set(record.names)
    for module, one in record.inside.items():
        child = children[module] = found.records[one.model_type, one.kind]
        seen = record.below.get(module, set())
        names |= {f"{pattern_of(module)}.{name}" for name in seen - child.usual - child.names}
        less = _names.pack(child.usual - seen) if seen and not one.key else ""
        entry = [module, one.kind, one.key, less, list(one.when) if one.when else ""]
        while not entry[-1]:
            entry.pop()
        inside.append(entry)
    facts = record.facts
    known = {
        "follows": facts["follows"],
        "head": _through(facts, "head", children),
        "ignored": _own(facts["ignored"], "ignored", children),
        "inside": inside,
        "names": _names.pack(names),
        "optional": _own(facts["optional"], "optional", children),
        "over": _over(record, found),
        "ties": sorted(map(list, record.ties.items())),
    }
    row = {key: value for key, value in known.items() if value}
    row["prefix"] = facts["prefix"]
    if facts["bare"] is _table.has(row, facts["prefix"]):
        row["bare"] = facts["bare"]
    embedding = _through(facts, "embedding", children) or ""
    usual = "@" + facts["prefix"] if facts["prefix"] in children else ""
    return row if embedding == usual else {"embedding": embedding, **row}


def _own(patterns: Iterable[str], what: str, children: dict[str, _survey.Record]) -> list[str]:
    """The patterns that are not those of the models inside, as `_table` gathers them."""
    inner: set[str] = set()
    for module, child in children.items():
        inner |= set(child.facts[what]) if "." not in module else set(child.facts[what]).intersection(_table.ADDED)
    return [text for text in patterns if text not in inner]


def _over(record: _survey.Record, found: _survey.Survey) -> dict[str, str]:
    """The classes of models deeper inside that are others here than usual, "" for one that is not there."""
    usual = _usually(record, found, "")
    differ = {}
    for module, (kind, model_type) in usual.items():
        actual = record.tree.get(module, ("", ""))[0]
        upper = _traits.above(module, usual)
        there = not upper or upper in record.tree
        if record.tree and there and actual != kind and (not actual or (model_type, actual) in found.records):
            differ[module] = actual
    return differ


def _usually(record: _survey.Record, found: _survey.Survey, module: str) -> dict[str, tuple[str, str]]:
    seen = {}
    for name, one in record.inside.items():
        if one.when is None and module.count(".") < 20:
            below = f"{module}.{name}" if module else name
            seen[below] = one.kind, one.model_type
            seen |= _usually(found.records[one.model_type, one.kind], found, below)
    return seen


def _through(facts: dict[str, Any], what: str, children: dict[str, _survey.Record]) -> str | None:
    name = facts[what]
    for module, child in children.items():
        inner = child.facts[what]
        if name is not None and inner is not None and name == f"{module}.{inner}":
            return "@" + module
    return name if name is None else str(name)


def rules() -> dict[str, Any]:
    """The conversion of each class or model type that has one; one that another has too is only named."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("legacy")
    known: dict[str, Any] = {}
    first: dict[str, str] = {}
    for name in sorted(conversion_mapping._checkpoint_conversion_mapping_cache):
        transforms = conversion_mapping.get_checkpoint_conversion_mapping(name)
        row = [_rule(_traits.rule(transform)) for transform in transforms]
        other = first.setdefault(json.dumps(row), name)
        known[f"rules {name}"] = [_shared(rule, f"{name} {i}", first) for i, rule in enumerate(row)]
        if other != name:
            known[f"rules {name}"] = other
    return known


def _rule(rule: Any) -> list[Any]:
    steps = [[step.name, dict(step.options)] for step in rule.operations]
    plain = [rule.kind, rule.sources, rule.targets, rule.back, steps, rule.offset]
    return _lines.short(json.loads(json.dumps(plain)))


def _shared(rule: list[Any], name: str, first: dict[str, str]) -> Any:
    """A rule, or where it stands already if that is shorter."""
    text = json.dumps(rule)
    other = first.setdefault(text, name)
    return other if other != name and len(other) < len(text) - 10 else rule


def text(rows: dict[str, Any]) -> str:
    """The file: one JSON object, a row on each line."""
    lines = (f"{json.dumps(key)}: {json.dumps(row, separators=(',', ':'))}" for key, row in rows.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    """Write the table, or compare it (`--check`)."""
    rows, left_out = table(workers=min(os.cpu_count() or 1, 8))
    made = text(rows)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if "--check" in arguments:
        same = HERE.read_text("utf-8") == made
        print(
            "the table is what transformers makes"
            if same
            else f"{HERE}: transformers makes another; run make architectures"
        )
        return 0 if same else 1
    HERE.write_text(made, "utf-8")
    print(f"{HERE}: {len(made)} bytes, {len(rows)} lines")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
