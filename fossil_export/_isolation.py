"""The current folder kept off Python's path: what lies in it is the user's data, or somebody else's, and not code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def forget_current_folder(started_by_module: bool = False) -> None:
    """Take the current folder off this process's path, where Python put it without being asked by name.

    `python -m` puts it first; an empty entry of PYTHONPATH (`PYTHONPATH=$PYTHONPATH:/more` where it was not set)
    means it too. An entry that names the folder stays: that is a wish. What Python itself has loaded by then
    (sitecustomize, runpy, the rest of its library) may have come from there; nothing that runs later can help it.
    """
    try:
        here = os.getcwd()  # noqa: PTH109  pathlib may not be loaded yet, and would come from there
    except OSError:  # the folder is gone
        return
    if started_by_module and not getattr(sys.flags, "safe_path", False) and sys.path[:1] in ([here], [""]):
        del sys.path[0]
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if "" in entries and here not in map(os.path.abspath, filter(None, entries)):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the empty entries of PYTHONPATH, each of which means the current folder."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    cleaned = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONINSPECT")}
    return cleaned | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})


def child_flags() -> list[str]:
    """The flags by which this Python was told what to leave out, for a child to be told the same."""
    known = {"I": sys.flags.isolated, "E": sys.flags.ignore_environment, "s": sys.flags.no_user_site}
    return [f"-{letter}" for letter, is_set in known.items() if is_set]
