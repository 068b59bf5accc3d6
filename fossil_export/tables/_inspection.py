"""What an adapter holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fossil_export._console import echo
from fossil_export.tables._fitting import print_pairs, print_table
from fossil_export.tables._merging import ratios_told
from fossil_export.tables._shared import GROUPS, named_at

if TYPE_CHECKING:
    from fossil_export._inspection import Inspection, Kind
    from fossil_export.merging._sizes import Size


def print_inspection(found: Inspection, every: bool = False) -> None:
    """What was found, by kind of module or for `every` one; the summary comes last."""
    kinds = found.kinds
    rows = []
    for kind in kinds if every else kinds[:GROUPS]:
        how = _how(kind)
        if every:
            places = found.plan.modules | found.plan.rows if found.plan is not None else {}
            for name in kind.members:
                whole = kind.method == "whole" and found.plan is not None
                place = places[name].name if name in places else name if whole else kind.tensor
                rows.append((name, how, kind.shapes, _after(place, name), _ratios([found.sizes.get(name)]), ""))
        else:
            place = _after(kind.tensor, kind.name)
            rows.append((kind.name, how, kind.shapes, place, _ratios(kind.sizes), str(len(kind.members))))
    head = ("module", "trained", "shapes", "base tensor", "‖ΔW‖/‖W‖", "×")
    shown = [place for place, name in enumerate(head) if _tells(name, [row[place] for row in rows])]
    print_table([head[one] for one in shown], [[row[one] for one in shown] for row in rows], less=("shapes",))
    if not every and len(kinds) > GROUPS:
        echo(f"and {len(kinds) - GROUPS} more kinds; --all shows every module")
    echo()
    _print_adapter(found)


def _tells(column: str, cells: Sequence[str]) -> bool:
    """Whether a column says more than what a reader expects."""
    return column != "×" or any(cells) if column != "base tensor" else set(cells) != {".weight"}


def _how(kind: Kind) -> str:
    """ "lora r=8 s=2": the method and its numbers."""
    rank = f" r={kind.rank}" if kind.rank else ""
    return kind.method + rank + (f" s={kind.scale:.4g}" if kind.scale is not None else "")


def _after(tensor: str, module: str) -> str:
    """The name of a base's tensor, without that of its module if it begins so."""
    return tensor.removeprefix(module) or "itself"


def _ratios(sizes: Sequence[Size | None]) -> str:
    return _span([size.ratio if size is not None else None for size in sizes])


def _span(norms: Sequence[float | None]) -> str:
    known = [norm for norm in norms if norm is not None]
    if not known:
        return "-"
    if min(known) == max(known):
        return f"{known[0]:.3g}"
    least, most = f"{min(known):.2g}", f"{max(known):.2g}"
    return least if least == most else f"{least}–{most}"


def _print_adapter(found: Inspection) -> None:
    from fossil_export._inspection import dtypes

    adapter = found.adapter
    saved = ", ".join(info.name for info in adapter.saved.values())
    pairs = [
        ("adapter", f"{named_at(adapter.name, adapter.revision)} ({adapter.peft_type})"),
        ("method", _counted(Counter(one.method for one in adapter.trained.values()))),
        ("rank", _counted(Counter(str(one.rank) for one in adapter.trained.values() if one.rank)) or "none"),
        ("modules", str(len(adapter.trained))),
        ("parameters", f"{adapter.parameters:,}"),
        ("dtype", ", ".join(dtypes(adapter))),
        ("also holds", saved or "nothing"),
        ("base", adapter.base_shown or "not named"),
        ("merge", _verdict(found)),
    ]
    if (change := _change(found)) is not None:
        pairs.append(("change", change))
    if found.plan is not None and found.plan.trained_on is not None:
        from fossil_export.merging._quantization_error import by_kind

        pairs.append(("trained on", found.plan.seen.told))
        if ratios := by_kind(found.sizes):
            pairs.append(("quantization", ratios_told(ratios)))
    print_pairs(pairs)


def _counted(found: Mapping[str, int]) -> str:
    """One name as it is, several with their numbers."""
    return ", ".join(found if len(found) == 1 else [f"{name} ({count})" for name, count in found.items()])


def _change(found: Inspection) -> str | None:
    """What the ratios mean, or why there are none."""
    if not found.adapter.is_here:
        return "not measured: the adapter's values are on the Hub, and only headers were read"
    if found.plan is None or found.problems:
        return None
    known = [size for size in found.sizes.values() if size.ratio is not None]
    if not known:
        return "not measured: the base's weights are not on this machine"
    all_of_it = math.sqrt(sum((s.update or 0) ** 2 for s in known) / sum((s.weight or 0) ** 2 for s in known))
    part = min(size.share for size in known)
    sampled = f"; of large weights {part:.0%} of the rows or more were read" if part < 1 else ""
    return f"{all_of_it:.2%} of the weights that are touched (‖ΔW‖/‖W‖, Frobenius){sampled}"


def _verdict(found: Inspection) -> str:
    if found.problems:
        return "stopped: " + "; ".join(found.problems)
    if found.plan is None:
        return "not checked: the base is not here, name it with --base"
    every, kept = len(found.plan.tensors), sum(map(found.plan.count, ("copy", "cast", "dequantize")))
    return f"possible, touches {every - kept} of {every} tensors"
