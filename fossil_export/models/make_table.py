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

from fossil_export.models import _names, _survey, _table, _traits

HERE = Path(__file__).with_name(_table.FILE)


def table(model_types: Iterable[str] | None = None, workers: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
    """The rows of the table by their key, and what was left out and why; all model types, or those given."""
    from transformers import CONFIG_MAPPING

    wanted = sorted(CONFIG_MAPPING.keys() if model_types is None else model_types)
    chunks = [wanted[start::32] for start in range(32)]
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            surveys = pool.map(survey, chunks, chunksize=1)
    else:
        surveys = list(map(survey, chunks))
    found = _survey.merge(surveys)
    return {"made of": _made_of(), **_rows(found), **rules()}, dict(sorted(found.left_out.items()))


def survey(model_types: Iterable[str]) -> _survey.Survey:
    """What the classes of these model types are."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    found = _survey.Survey()
    for model_type in model_types:
        _survey.survey(model_type, found)
    return found


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
            {key: kind for _, key, kind in sorted(record.inside.values()) if key and not key.startswith("=")}
        )
    for model_type, row in rows.items():
        row["auto"] = {auto: name for auto, name in classes(model_type).items() if _known(model_type, name, found)}
        row["of"] = found.of.get(model_type, {})
        for path in row["of"].values():
            row["parts"].setdefault(path, _part_type(model_type, path))
        row["ties"] = found.ties.get(model_type) or _usual(model_type)
        row["scales"] = model_type in found.scales
        rows[model_type] = {key: row[key] for key in ("auto", "classes", "of", "parts", "scales", "ties") if row[key]}
    return dict(sorted(rows.items()))


def _known(model_type: str, name: str, found: _survey.Survey) -> bool:
    return (model_type, name) in found.records or name in found.of.get(model_type, {})


def _part_type(model_type: str, path: str) -> str:
    from fossil_export.models import _configs

    return str(_configs.at(_configs.make({"model_type": model_type}), tuple(path.split("."))).model_type)


def _usual(model_type: str) -> dict[str, Any]:
    """Whether a type that ties nothing itself says that it ties: a composite may take that over."""
    from fossil_export.models import _configs

    try:
        on = bool(getattr(_configs.make({"model_type": model_type}), _configs.TIE, False))
    except Exception:  # a type of parts only
        return {}
    return {"": [on, [_configs.TIE, on]]} if on else {}


def _record(record: _survey.Record, model_type: str, found: _survey.Survey) -> dict[str, Any]:
    inside: list[list[str]] = []
    children = {}
    for module, (name, key, kind) in record.inside.items():
        children[module] = found.records[kind, name]
        entry = [module, name, key]
        less = children[module].usual - record.below.get(module, set()) if not key and module in record.below else ()
        inside.append([*entry, _names.pack(less)] if less else entry)
    facts = record.facts
    inner = {what: {v for child in children.values() for v in child.facts[what]} for what in ("ignored", "optional")}
    embedding = _through(facts, "embedding", children) or ""
    known = {
        "bare": facts["bare"],
        "follows": facts["follows"],
        "head": _through(facts, "head", children),
        "ignored": [text for text in facts["ignored"] if text not in inner["ignored"]],
        "inside": inside,
        "names": _names.pack(record.names),
        "optional": [text for text in facts["optional"] if text not in inner["optional"]],
        "prefix": facts["prefix"],
        "ties": sorted(map(list, record.ties.items())),
    }
    row = {key: value for key, value in known.items() if value}
    usual = "@" + facts["prefix"] if facts["prefix"] in children else None
    return row if embedding == usual or not (embedding or usual) else {"embedding": embedding, **row}


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
        known[f"rules {name}"] = row if other == name else other
    return known


def _rule(rule: Any) -> list[Any]:
    row = [rule.kind, rule.sources, rule.targets, rule.back, [[o.name, dict(o.options)] for o in rule.operations]]
    row = [*row, rule.offset] if rule.offset else row if rule.operations else row[:-1]
    return list(json.loads(json.dumps(row)))


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
