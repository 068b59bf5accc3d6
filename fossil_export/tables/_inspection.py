"""What an adapter holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fossil_export._console import print_pairs, print_table
from fossil_export._grouping import Group, grouped
from fossil_export.tables._shared import GROUPS, named_at

if TYPE_CHECKING:
    from fossil_export._inspection import Inspection
    from fossil_export.adapters import Trained


def print_inspection(found: Inspection, every: bool = False) -> None:
    """What was found, by kind of module or for `every` one; the summary comes last."""
    adapter = found.adapter
    touched = found.plan.modules if found.plan is not None else {}
    rows = [
        (module, _shapes(trained), touched[module].name if module in touched else "-")
        for module, trained in adapter.trained.items()
    ]
    norms = [found.norms.get(module) for module in adapter.trained]
    groups = [Group(row, (place,)) for place, row in enumerate(rows)] if every else grouped(rows)
    shown = groups if every else groups[:GROUPS]
    table = [(*g.cells, _span([norms[place] for place in g.members]), str(len(g))) for g in shown]
    print_table(("module", "shard", "base tensor", "norm", "×"), table)
    if len(shown) < len(groups):
        click.echo(f"and {len(groups) - len(shown)} more kinds; --all shows every module")
    click.echo()
    _print_adapter(found)


def _shapes(trained: Trained) -> str:
    return " + ".join("x".join(map(str, shape)) for shape in trained.shapes.values())


def _span(norms: Sequence[float | None]) -> str:
    known = [norm for norm in norms if norm is not None]
    if not known:
        return "-"
    least, most = f"{min(known):.4g}", f"{max(known):.4g}"
    return least if least == most else f"{least}–{most}"


def _print_adapter(found: Inspection) -> None:
    from fossil_export._inspection import dtypes

    adapter = found.adapter
    saved = ", ".join(info.name for info in adapter.saved.values())
    pairs = [
        ("adapter", f"{named_at(adapter.name, adapter.revision)} ({adapter.peft_type})"),
        ("variant", adapter.variant),
        ("rank", str(adapter.rank)),
        ("modules", str(len(adapter.trained))),
        ("parameters", f"{adapter.parameters:,}"),
        ("dtype", ", ".join(dtypes(adapter))),
        ("also holds", saved or "nothing"),
        ("base", adapter.base_model or "not named"),
        ("merge", _verdict(found)),
    ]
    if not found.norms:
        pairs.append(("norms", "not known: the values are on the Hub, and only headers were read"))
    print_pairs(pairs)


def _verdict(found: Inspection) -> str:
    if found.problems:
        return "stopped: " + "; ".join(found.problems)
    if found.plan is None:
        return "not checked: the base is not here, name it with --base"
    return (
        f"possible, touches {len(found.plan.tensors) - found.plan.count('copy')} of {len(found.plan.tensors)} tensors"
    )
