"""Two checkouts, the same commands: is every byte of every output the same?

    python benchmarks/same_bytes.py --old /path/to/other/checkout
    python benchmarks/same_bytes.py --old /path/to/other/checkout --only merge,onnx --cases 200 --seed 1

makes tiny random bases, adapters and graphs, and runs the commands on them with the package of the other checkout and
with that of this one, in processes of their own. Exit codes, what is printed, and every file are compared byte by
byte; of what is printed, times and memory are left out. Publishing goes to the Hub of the tests. Exits with 1 if
anything differs. Outputs of both stay in --work, if that is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from same import graph_cases, hub_cases
from same.cases import KINDS, Case, Maker
from same.sides import run

ALL: dict[str, Callable[[Maker, int], Iterator[Case]]] = {
    "models": graph_cases.models,
    **KINDS,
    "onnx": graph_cases.exports,
    "push": hub_cases.pushes,
}
NEW = Path(__file__).resolve().parents[1]
SHOWN = 40
"""Bytes shown from the first that differs, and half as many before."""


@dataclass(frozen=True)
class Difference:
    """`file` is a file of the case or a stream of a command; `byte` is the first that differs, none if one side has no
    such file."""

    case: str
    name: str
    file: str
    byte: int | None
    old: str
    new: str


def compare(case: str, name: str, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> Iterator[Difference]:
    for file in sorted(old.keys() | new.keys()):
        before, after = old.get(file), new.get(file)
        if before is None or after is None:
            yield Difference(case, name, file, None, _told(before), _told(after))
        elif before != after:
            pairs = enumerate(zip(before, after))  # noqa: B905  the shorter one may be all there is
            byte = next((at for at, (one, other) in pairs if one != other), min(len(before), len(after)))
            start = max(0, byte - SHOWN // 2)
            shown = [repr(content[start : byte + SHOWN])[1:] for content in (before, after)]
            yield Difference(case, name, file, byte, *shown)


def _told(content: bytes | None) -> str:
    return "missing" if content is None else f"{len(content)} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with this one")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument("--cases", type=int, default=60, help="drawn at random of merge, convert, onnx (default 60)")
    parser.add_argument("--only", default=",".join(ALL), help=f"kinds of cases (default {','.join(ALL)})")
    parser.add_argument("--jobs", type=int, default=2, help="kinds that run at once (default 2)")
    parser.add_argument("--work", type=Path, help="a new folder that keeps inputs and outputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    kinds = options.only.split(",")
    if unknown := set(kinds) - set(ALL):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(ALL)}")
    if not (options.old / "fossil_export").is_dir():
        parser.error(f"--old: {options.old} has no folder fossil_export")

    with tempfile.TemporaryDirectory() as temporary:
        place = options.work or Path(temporary) / "same"
        place.mkdir(parents=True)
        place = place.resolve()
        cases = {
            f"{kind}-{number:03}": case
            for kind in kinds
            for number, case in enumerate(ALL[kind](Maker(kind, place / "inputs", options.seed), options.cases))
        }
        sides = []
        for name, checkout in (("old", options.old.resolve()), ("new", NEW)):
            sides.append(run(checkout, cases, place / "inputs", place / "work", options.jobs))
            (place / "work").rename(place / name)

    old, new = sides
    differences = [
        found
        for name in sorted(old.keys() | new.keys())
        for found in compare(name, cases[name].name if name in cases else name, old.get(name, {}), new.get(name, {}))
    ]
    differing = {found.case for found in differences}
    table = {}
    for kind in kinds:
        mine = [name for name, case in cases.items() if case.kind == kind]
        exits = [content for name in mine for key, content in new[name].items() if key.endswith(": exit")]
        different = len(differing.intersection(mine))
        counts = (len(mine), len(exits), exits.count(b"0"), len(mine) - different, different)
        table[kind] = dict(zip(("cases", "commands", "exit 0", "same", "different"), counts, strict=True))
    if options.json:
        print(json.dumps({"kinds": table, "differences": [asdict(found) for found in differences]}))
    else:
        show(table, differences)
    sys.exit(1 if differences else 0)


def show(table: Mapping[str, Mapping[str, int]], differences: list[Difference]) -> None:
    header = ("kind", *next(iter(table.values())))
    print("".join(f"{name:>10}" for name in header))
    for kind, counts in table.items():
        print(f"{kind:>10}" + "".join(f"{count:>10}" for count in counts.values()))
    for found in differences:
        place = "" if found.byte is None else f", from byte {found.byte}"
        print(f"\n{found.case} ({found.name}): {found.file}{place}\n  old {found.old}\n  new {found.new}")


if __name__ == "__main__":
    main()
