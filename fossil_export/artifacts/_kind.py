"""A kind of artifact, as data: what tells it, which files are its own, what it means in a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import FossilExportError

if TYPE_CHECKING:
    from fossil_export.verifying._artifacts import Artifact

ADAPTER_CONFIG = "adapter_config.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """A folder that may be an artifact: the `names` of its files, and its record, None without one. `error` is raised
    if a file cannot be read."""

    folder: Path
    names: tuple[str, ...]
    record: Record | None
    error: type[FossilExportError]

    @cached_property
    def root(self) -> frozenset[str]:
        """The names that lie in no folder of it."""
        return frozenset(name for name in self.names if "/" not in name)

    @cached_property
    def peft_type(self) -> str | None:
        """What adapter_config.json says, in PEFT's words; None without that file."""
        if ADAPTER_CONFIG not in self.root:
            return None
        return str(read_json(self.folder / ADAPTER_CONFIG, self.error).get("peft_type"))

    def has(self, *patterns: str) -> bool:
        """Whether a file in the root is named like that."""
        return bool(matching(self.root, patterns))


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names in the root that one of the patterns fits."""
    patterns = list(patterns)
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)]


def _as_it_is(folder: Path, names: tuple[str, ...], wanted: set[str]) -> set[str]:
    return wanted


def _nothing(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    return None, ()


@dataclass(frozen=True)
class Kind:
    """One kind. What the model card says of it is in cards/kinds/.

    - `recognised(look)`: whether a folder is one. `KINDS` is asked in its order.
    - `suffix`: of a file that is one by itself, without a folder.
    - `patterns`: names of its files in the root. `parts(folder, names, wanted)` gives all, if patterns do not tell.
    - `config`: the file that describes the model. `peft_types`: what may stand in an adapter's, in PEFT's words.
    - `told(folder, names)`: what stands for the record if there is none, and why nothing does.
    - `title`: its word in the commit's title.
    - `whole`: it is a whole model, made from the base's weights. So its record names the base's commit if the base was
      on the Hub, and it must not be put in the place of its base.
    - `not_beside`: names in the root of a repository that it must not meet, and `clash` what is wrong then.
    - `replaces(name)`: whether a file of an earlier model in the root would be loaded in its place.
    - `by_itself`: it has no record in the repository, so that one of an earlier model may stay.
    - `verified`: whether `verify` looks at it; `opened(path)` gives what it looks at, or raises the error that says
      why it does not.
    - `task`: what it does if no config tells, in the Hub's words.
    """

    name: str
    title: str
    recognised: Callable[[Look], bool]
    opened: Callable[[Path], Artifact]
    patterns: tuple[str, ...] = ()
    suffix: str | None = None
    config: str | None = None
    peft_types: tuple[str, ...] = ()
    parts: Callable[[Path, tuple[str, ...], set[str]], set[str]] = _as_it_is
    told: Callable[[Path, Iterable[str]], tuple[dict[str, Any] | None, tuple[str, ...]]] = _nothing
    whole: bool = False
    not_beside: frozenset[str] = frozenset()
    clash: str = ""
    replaces: Callable[[str], bool] = lambda name: False
    by_itself: bool = False
    verified: bool = True
    task: str | None = None

    @property
    def commit_title(self) -> str:
        """The commit's title if the user gave none."""
        return f"Upload {self.title} with fossil-export"
