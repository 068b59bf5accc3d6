"""Names that the Hub takes, of repositories, branches and files. Everything else is a 400."""

from __future__ import annotations

import re

from loopback.git import Refusal

_TOLD = (
    "Only regular characters and '-', '_', '.' are accepted. '--' and '..' are forbidden. '-' and '.' cannot start or "
    'end the name. The name cannot end with ".git". Max length is 96.'
)


def check_repo(repo_id: str) -> None:
    for part in repo_id.split("/"):
        bad = "--" in part or ".." in part or part[-1:] in "-." or part.endswith((".git", ".ipynb"))
        if bad or not re.fullmatch(r"\w[\w.-]*", part, re.ASCII):
            raise Refusal(400, _TOLD)
    if repo_id.count("/") != 1 or len(repo_id) > 96:
        raise Refusal(400, _TOLD)


def check_branch(name: str) -> None:
    """As `git check-ref-format --branch` has it; pull requests have a space of their own."""
    bad = re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/]|[/.]$|\.lock(/|$)|(^|/)\.", name)
    if not name or bad or name == "@" or name.startswith("refs/") or re.fullmatch("[0-9a-f]{40}", name):
        raise Refusal(400, f"Invalid reference name: {name!a}")


def check_path(path: str) -> None:
    """A file's name in a commit."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise Refusal(400, f"Invalid path: {path!a}")
    if re.search(r"[\x00-\x1f\x7f\\]", path) or any(len(part.encode()) > 255 for part in parts):
        raise Refusal(400, f"Invalid path: {path!a}")
