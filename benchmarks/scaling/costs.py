"""How long the work of a plan takes, by a simple model.

Each worker plans for itself, then takes whole files. Reading, computing and writing go on at the same time, so that the
slowest of them bounds a worker. Files are given out from the largest to the smallest, each to the worker that is free
first, which is what a queue of tasks does; parts of a fixed list come out the same or a little worse.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.constants import Constants
from scaling.work import FileWork


@dataclass(frozen=True)
class Place:
    """Where base and result are, and `what` of it bounds a merge. Rates are in bytes a second: `each` of one worker,
    `all` of all workers together (None: no bound). `duplex` says that reading and writing do not share the rate, and
    `shared` that several workers can use it."""

    name: str
    what: str
    each: float
    all: float | None = None
    duplex: bool = False
    shared: bool = True

    def seconds(self, read: int, written: int, rate: float) -> float:
        return (max(read, written) if self.duplex else read + written) / rate


def network(gigabits: float) -> Place:
    return Place(f"object store, {gigabits:g} Gbit/s", "network", gigabits * 1e9 / 8, duplex=True)


def places(disk: float = 2.5e9, share: float = 1e9, gigabits: Sequence[float] = (10, 25, 100)) -> list[Place]:
    """A local disk (of one machine alone), a network file system that all workers share, object stores."""
    return [
        Place(f"local disk, {disk / 1e9:g} GB/s", "disk", disk, shared=False),
        Place(f"shared folder, {share / 1e9:g} GB/s", "folder", share, all=share),
        *map(network, gigabits),
    ]


@dataclass(frozen=True)
class Estimate:
    """`seconds` of wall time in all, and what is their `bound`: planning, processor, file (the largest one) or what the
    place says; `balance` is the mean work of a worker by the largest."""

    seconds: float
    bound: str
    balance: float


def divided(weights: Sequence[float], workers: int) -> list[list[int]]:
    """Numbers of the files of each worker."""
    found: list[list[int]] = [[] for _ in range(workers)]
    free = [(0.0, worker) for worker in range(workers)]
    for number in sorted(range(len(weights)), key=lambda one: -weights[one]):
        busy, worker = heapq.heappop(free)
        found[worker].append(number)
        heapq.heappush(free, (busy + weights[number], worker))
    return found


def estimate(
    work: Sequence[FileWork], constants: Constants, place: Place, workers: int, cores: int, planning: float
) -> Estimate:
    """`planning` is seconds, of every worker."""

    def sides(file: FileWork) -> tuple[float, float]:
        cpu = constants.seconds(dict(file.elements), file.copied) / cores
        return place.seconds(file.read + file.trained, file.written, place.each), cpu

    costs = [sides(file) for file in work]
    parts = divided([max(pair) for pair in costs], workers)
    totals = [(sum(costs[one][0] for one in own), sum(costs[one][1] for one in own)) for own in parts]
    slowest = max(totals, key=max)
    seconds, bound = max(slowest), place.what if slowest[0] >= slowest[1] else "processor"
    busy = [max(pair) for pair in totals]
    balance = sum(busy) / len(busy) / seconds if seconds else 1.0
    if seconds <= 1.0001 * max(max(pair) for pair in costs) and workers > 1 and balance < 0.9:
        bound = "file"
    if place.all is not None:
        read, written = sum(file.read + file.trained for file in work), sum(file.written for file in work)
        together = place.seconds(read, written, place.all)
        if together > seconds:
            seconds, bound = together, place.what
    if planning > seconds:
        bound = "planning"
    return Estimate(planning + seconds, bound, balance)
