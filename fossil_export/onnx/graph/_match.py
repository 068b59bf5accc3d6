"""Which node is which module: by what the exporter wrote down, by names, by content.

Names only propose; the values decide. A place is taken when sampled rows of the graph's weight are the base's,
rounded to the graph's dtype (or, quantized, as near as its bits allow). So a graph of another model is seen
before anything is written, and a graph without names is no obstacle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export.checkpoints._dtypes import numpy_dtype
from fossil_export.errors import OnnxError, listed
from fossil_export.onnx.graph._sites import Site
from fossil_export.onnx.graph._weight import SAFETENSORS_NAME

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

PACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")),
    "in_proj": (("q_proj", "k_proj", "v_proj"),),
    "c_attn": (("q_proj", "k_proj", "v_proj"),),
    "query_key_value": (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}
"""Names under which several layers of one input are kept in one weight, and the order they have in it."""

SAMPLE_ROWS = 16

_TOLERANCE = {"FLOAT": 2.0**-23, "DOUBLE": 2.0**-23, "FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8}
_SMALLEST = {"FLOAT": 1e-30, "DOUBLE": 1e-30, "FLOAT16": 2.0**-24, "BFLOAT16": 1e-30}
QUANTIZED_TOLERANCE = {8: 0.03, 4: 0.35, 2: 0.8}
# Relative; of float values one by one, of quantized ones over the sampled rows, where rounding to nearest in
# blocks of 32 leaves about 0.1 in 4 bits and unrelated weights 1.4.


@dataclass(frozen=True)
class Wanted:
    """A trained module: its names (the trainer's, the checkpoint's) and its base weight (out, in), a view."""

    module: str
    names: tuple[str, ...]
    weight: Array

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1])


@dataclass(frozen=True)
class Piece:
    """Outputs [start, start + count) of `module` are outputs [at, at + count) of a site."""

    module: str
    start: int
    at: int
    count: int


Found = dict[Site, list[Piece]]


@np.errstate(over="ignore", invalid="ignore")  # of values in the graph that are not finite, and so are not the base's
def find_places(wanted: Sequence[Wanted], sites: Sequence[Site], siblings: Mapping[str, int], graph: str) -> Found:
    """Give every module of `wanted` its place among `sites`.

    `siblings` are the widths (outputs) of all layers of the base by name, trained or not: they say where a
    packed weight is cut. `graph` names the graph in messages. Raises OnnxError that lists the modules that
    have no place, or more than one.
    """
    finder = _Finder(sites, siblings)
    found: Found = defaultdict(list)
    missing: list[str] = []
    near: list[str] = []
    for one in wanted:
        places, differing = finder.places(one)
        if not places:
            missing.append(one.module)
            near += differing[:1]
        weights = {id(site.weight.value): site for site, _ in places}
        if len(weights) > 1 and sum(piece.count for _, piece in places) != one.outputs:
            names = [f"{site.name} [{piece.at}:{piece.at + piece.count}]" for site, piece in places]
            raise OnnxError(
                f"{graph}: module {one.module} could be {listed(names)}, which hold equal weights; "
                "export the graph with names, or use --runtime to have it made here"
            )
        for site, piece in finder.calls(one, places):
            found[site].append(piece)
    if missing:
        where = (
            f"{near[0]} holds other weights than the base: the graph was made from another model, name its base "
            "with --base"
            if near
            else "no product in it has the base's weights; name the base the graph was made from with --base"
        )
        raise OnnxError(f"{graph}: has no place for {listed(missing)}: {where}")
    _refuse_overlaps(found, graph)
    return dict(found)


class _Finder:
    def __init__(self, sites: Sequence[Site], siblings: Mapping[str, int]) -> None:
        self._sites = sites
        self._siblings = siblings
        self._by_tail: dict[tuple[tuple[str, ...], str], list[Site]] = defaultdict(list)
        self._keys: dict[tuple[Site, bool], Array] = {}
        for site in sites:
            for key in {_tail(path) for path in (*site.paths, *site.scopes)}:
                self._by_tail[key].append(site)

    def places(self, one: Wanted) -> tuple[list[tuple[Site, Piece]], list[str]]:
        """Where `one` is, by the first kind of evidence that has it; and sites whose names fit but not the values."""
        differing: list[str] = []
        for candidates in (self._named_exactly(one), self._named_alike(one)):
            hits = [(site, piece) for site, piece in candidates if _same(site, one, piece)]
            if hits:
                return hits, []
            differing += [site.name for site, _ in candidates if site.name not in differing]
        parts = self._split(one)
        if parts:
            return parts, []
        return list(self._by_content(one)), differing

    def calls(self, one: Wanted, places: list[tuple[Site, Piece]]) -> list[tuple[Site, Piece]]:
        """`places`, and the further calls of the same module: products of the same weight, or of a copy of it under
        the same name with a number at its end, as exporters give them."""
        taken = {id(site) for site, _ in places}
        further = []
        for site, piece in places:
            names = {_unnumbered(path) for path in (*site.paths, *one.names)}
            for other in self._sites:
                if id(other) in taken or _shape(other) != _shape(site):
                    continue
                if other.weight.value is site.weight.value or (
                    names & {_unnumbered(path) for path in (*other.paths, *other.scopes)} and _same(other, one, piece)
                ):
                    taken.add(id(other))
                    further.append((other, piece))
        return places + further

    def _named_exactly(self, one: Wanted) -> list[tuple[Site, Piece]]:
        whole = Piece(one.module, 0, 0, one.outputs)
        return [
            (site, whole)
            for site in self._sites
            if _shape(site) == one.weight.shape and any(name in (*site.scopes, *site.paths) for name in one.names)
        ]

    def _named_alike(self, one: Wanted) -> list[tuple[Site, Piece]]:
        """The same numbers and the same last name, or a packed weight that by its name holds this module."""
        found = []
        for name in one.names:
            numbers, last = _tail(name)
            for site in self._by_tail.get((numbers, last), ()):
                if _shape(site) == one.weight.shape:
                    found.append((site, Piece(one.module, 0, 0, one.outputs)))
            for pack, orders in PACKS.items():
                for site in self._by_tail.get((numbers, pack), ()):
                    for at in self._offsets(name, last, orders):
                        if site.weight.inputs == one.inputs and at + one.outputs <= site.weight.outputs:
                            found.append((site, Piece(one.module, 0, at, one.outputs)))
        return list(dict.fromkeys(found))

    def _offsets(self, name: str, last: str, orders: tuple[tuple[str, ...], ...]) -> Iterator[int]:
        parent = name[: len(name) - len(last)]
        for order in orders:
            if last in order:
                before = [self._siblings.get(parent + sibling) for sibling in order[: order.index(last)]]
                if None not in before:
                    yield sum(width for width in before if width is not None)

    def _split(self, one: Wanted) -> list[tuple[Site, Piece]]:
        """A module that is packed in the model and apart in the graph."""
        for name in one.names:
            numbers, last = _tail(name)
            for order in PACKS.get(last, ()):
                parts: list[tuple[Site, Piece]] = []
                start = 0
                for part in order:
                    for site in self._by_tail.get((numbers, part), ()):
                        piece = Piece(one.module, start, 0, site.weight.outputs)
                        if start + piece.count <= one.outputs and _same(site, one, piece):
                            parts.append((site, piece))
                            start += piece.count
                            break
                if start == one.outputs:
                    return parts
        return []

    def _by_content(self, one: Wanted) -> Iterator[tuple[Site, Piece]]:
        first = np.asarray(one.weight[0, :8], np.float32)
        for site in self._sites:
            if site.weight.inputs != one.inputs or site.weight.outputs < one.outputs:
                continue
            starts: Iterable[int] = (0,)
            if site.weight.outputs > one.outputs:
                distance = np.abs(self._beginnings(site, True)[: site.weight.outputs - one.outputs + 1] - first).max(1)
                limit = max(2 * _tolerance(site), 1e-6) * max(float(np.abs(first).max()), 1e-6)
                starts = np.flatnonzero(distance <= limit).tolist()
            elif site.weight.bits is None and not np.allclose(self._beginnings(site, False)[0], first, 2**-7, 1e-6):
                continue  # most are told by their first row
            for at in starts:
                piece = Piece(one.module, 0, at, one.outputs)
                if _same(site, one, piece):
                    yield site, piece

    def _beginnings(self, site: Site, all_rows: bool) -> Array:
        """The first values of every row of a site's weight, or of its first row alone."""
        if (site, all_rows) not in self._keys:
            self._keys[site, all_rows] = site.weight.read(slice(None) if all_rows else slice(0, 1))[:, :8].copy()
        return self._keys[site, all_rows]


def _same(site: Site, one: Wanted, piece: Piece) -> bool:
    """Whether sampled rows of the site's weight are those of the module's."""
    if site.weight.inputs != one.inputs or piece.at + piece.count > site.weight.outputs:
        return False
    rows = np.unique(np.linspace(0, piece.count - 1, SAMPLE_ROWS).astype(int))
    stored = site.weight.read(piece.at + rows)
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.asarray(one.weight[piece.start + rows], np.float32)
        rounded = want
        if site.weight.bits is None:
            rounded = want.astype(numpy_dtype(SAFETENSORS_NAME[site.weight.dtype])).astype(np.float32)
        if np.array_equal(stored, rounded):
            return True
        if site.weight.bits is None:
            # Every value by itself: an update that is small in the norm is not small in the small values.
            return bool(
                (np.abs(stored - want) <= 2 * _tolerance(site) * np.abs(want) + _SMALLEST[site.weight.dtype]).all()
            )
        size = float(np.linalg.norm(want))
        return size > 0 and float(np.linalg.norm(stored - want)) <= _tolerance(site) * size


def _tolerance(site: Site) -> float:
    bits = site.weight.bits
    return _TOLERANCE[site.weight.dtype] if bits is None else QUANTIZED_TOLERANCE.get(bits, 0.03)


def _shape(site: Site) -> tuple[int, int]:
    return site.weight.outputs, site.weight.inputs


def _unnumbered(name: str) -> str:
    """A name without the number that a repeated call gets: `ffn_2` is a call of `ffn`."""
    return re.sub(r"_\d+(?=\.|$)", "", name)


def _tail(name: str) -> tuple[tuple[str, ...], str]:
    """The numbers in a name (its layer) and its last component."""
    parts = name.split(".")
    return tuple(re.findall(r"\d+", ".".join(parts[:-1]))), parts[-1]


def _refuse_overlaps(found: Found, graph: str) -> None:
    for site, pieces in found.items():
        ordered = sorted(pieces, key=lambda piece: piece.at)
        for one, other in pairwise(ordered):
            if other.at < one.at + one.count:
                raise OnnxError(
                    f"{graph}: modules {one.module} and {other.module} have the same place, {site.name}; their base "
                    "weights are equal and the graph has no names, export it with names"
                )
