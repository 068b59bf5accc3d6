"""What a push, a streamed merge and a certificate have in common: what is on the Hub now."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fossil_export._shown import line, readable_bytes, table
from fossil_export.publishing._repository import Commit, Repository


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now.

    Attributes:
        repo_id: The repository.
        revision: The branch, or the pull request's ref.
        commit: Its commit.
        url: The page for people.
        pr_url: The pull request's page, None unless asked for.
        changed: False if all of it was there already.
        files: Names that were published.
        removed: Weights of an earlier model that stood in the way.
        left_behind: Names in the folder that are no part of the model.
        nbytes: Size in bytes of what was published.
        seconds: Wall time.
        warnings: Lines that the user should see.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    pr_url: str | None
    changed: bool
    files: tuple[str, ...]
    removed: tuple[str, ...]
    left_behind: tuple[str, ...]
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        said = f"{self.url}: {len(self.files)} files, {self.nbytes:,} bytes, commit {self.commit[:12]}"
        return line("PushResult", said)

    def _repr_html_(self) -> str:
        rows = [
            ("repository", self.repo_id),
            ("page", self.url),
            ("revision", self.revision),
            ("commit", self.commit[:12] + ("" if self.changed else " (nothing was to be changed)")),
            ("files", f"{len(self.files)}, {readable_bytes(self.nbytes)}"),
            ("removed", ", ".join(self.removed)),
            ("left behind", ", ".join(self.left_behind)),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table("Published", rows, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "repo_id": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "url": self.url,
            "pr_url": self.pr_url,
            "changed": self.changed,
            "files": list(self.files),
            "removed": list(self.removed),
            "left_behind": list(self.left_behind),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    @classmethod
    def of(
        cls,
        repository: Repository,
        commit: Commit,
        started: float,
        files: Iterable[str],
        nbytes: int,
        warnings: Iterable[str],
        removed: Iterable[str] = (),
        left_behind: Iterable[str] = (),
    ) -> PushResult:
        """The result of a commit; `started` is when the clock began."""
        return cls(
            repo_id=repository.repo_id,
            revision=f"refs/pr/{commit.pr_url.rpartition('/')[2]}" if commit.pr_url else repository.revision or "main",
            commit=commit.oid,
            url=commit.pr_url or repository.page,
            pr_url=commit.pr_url,
            changed=commit.changed,
            files=tuple(files),
            removed=tuple(removed),
            left_behind=tuple(left_behind),
            nbytes=nbytes,
            seconds=time.perf_counter() - started,
            warnings=tuple(warnings),
        )
