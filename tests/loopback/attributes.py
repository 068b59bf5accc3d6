"""Which files a repository keeps outside of git: what .gitattributes says, and what the Hub adds to it."""

from __future__ import annotations

import re

# With these lines the Hub starts every repository, in a first commit of its own.
_FIRST = re.findall(
    r"\S+",
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*",
)
_LFS = " filter=lfs diff=lfs merge=lfs -text\n"
GITATTRIBUTES = "".join(pattern + _LFS for pattern in _FIRST).encode()
LARGE = 10 << 20
"""Bytes above which the Hub takes no file into git."""
SAMPLE = 512
"""Bytes from a file's beginning that the client shows before it uploads it."""


def upload_mode(path: str, size: int, sample: bytes, attributes: bytes) -> str:
    """ "lfs" if the file matches a line of .gitattributes, is large or binary; else "regular"."""
    heavy = size > LARGE or b"\0" in sample[:SAMPLE] or is_tracked(path, attributes)
    return "lfs" if heavy else "regular"


def is_tracked(path: str, attributes: bytes) -> bool:
    """Whether the last line that matches and speaks of a filter says lfs."""
    found = False
    for line in attributes.decode(errors="replace").splitlines():
        pattern, *told = line.split() or [""]
        filters = [word for word in told if re.match(r"[-!]?filter\b", word)]
        if filters and not pattern.startswith("#") and matches(pattern, path):
            found = filters[-1] == "filter=lfs"
    return found


def tracking(attributes: bytes, *paths: str) -> bytes:
    """The same with a line for each of the files that no line tracks."""
    more = "".join(path.replace(" ", "[[:space:]]") + _LFS for path in paths if not is_tracked(path, attributes))
    return attributes + more.encode()


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether a .gitignore at the root leaves the file out."""
    found = False
    for line in gitignore.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            kept = pattern.startswith("!")
            pattern = pattern.lstrip("!")
            # What is in an ignored folder is ignored.
            parts = path.split("/")
            parents = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
            hit = any(matches(pattern.rstrip("/"), one) for one in parents)
            if hit or (not pattern.endswith("/") and matches(pattern, path)):
                found = not kept
    return found


def matches(pattern: str, path: str) -> bool:
    """Git's rule: without a slash it is of the name, wherever the file lies, else of the whole path."""
    if "/" not in pattern.rstrip("/"):
        path = path.rpartition("/")[2]
    return re.fullmatch(_regex(pattern.lstrip("/")), path) is not None


def _regex(pattern: str) -> str:
    found = ""
    for part in re.findall(r"\[\[:space:\]\]|\[[^\]]*\]|\*\*/|\*\*|\*|\?|[^*?\[]|\[", pattern):
        known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "[[:space:]]": r"\s"}
        found += known.get(part) or (part if part[0] == "[" and len(part) > 1 else re.escape(part))
    return found
