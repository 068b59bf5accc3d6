"""How many cores this process may use: a container may have two of the 64 that the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores of the machine, as far as affinity and the quota of the control group let them be used; at least 1.

    Source: sched_getaffinity(2); `cpu.max` in Linux's cgroup-v2.rst, `cpu.cfs_quota_us` in sched-bwc.rst (version 1).
    """
    found = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # on Linux
        found.append(len(os.sched_getaffinity(0)))
    found += (max(1, round(quota)) for quota in _quotas(GROUPS, MOUNT))
    return min(found)


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    """The quotas of this process's group and of those around it, in cores."""
    try:
        lines = groups.read_text().splitlines()
    except (OSError, ValueError):  # no Linux
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, names = mount, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = mount / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = Path(path.lstrip("/"))
        if ".." in group.parts:  # one outside of what this container sees
            group = Path()
        for folder in (group, *group.parents):  # a container may see its own group as the root
            with suppress(OSError, ValueError):  # without a quota the file has "max" or is not there
                amount, period = (float(word) for name in names for word in (root / folder / name).read_text().split())
                if amount > 0 < period:
                    yield amount / period
