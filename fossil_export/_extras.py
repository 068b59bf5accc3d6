"""Optional packages, imported when they are needed, with one message that says what to install for all of them.

A command says first what it will need as far as its options tell (`needing`), so that the first package that is found
missing is named together with the rest.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fossil_export.errors import FossilExportError, MissingExtraError

EXTRAS = {
    "fsspec": ("fsspec",),
    "genai": (
        "accelerate", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript", "peft", "torch",
        "transformers",
    ),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnx_ir", "onnxruntime"),
    "peft": ("accelerate", "peft", "torch", "transformers"),
    "ray": ("ray",),
    "torch": ("torch",),
}  # fmt: skip
"""The modules that each extra of pyproject.toml brings; a test holds one against the other."""

OF_SCHEMES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
"""What fsspec needs besides itself, for those addresses that the help names."""


@dataclass(frozen=True)
class Need:
    """Modules that are needed, and the extra that brings them; without an extra they are packages of that name."""

    extra: str | None
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.modules if not has(name))


def need(extra: str, *modules: str) -> Need:
    """All that an extra brings, or no more than `modules` of it."""
    return Need(extra, modules or EXTRAS[extra])


FORWARD = need("peft")
GGUF_BASE = (need("gguf"), need("peft", "torch", "transformers"))
"""Its config and tokenizer are made by transformers."""

_wanted: ContextVar[tuple[Need, ...]] = ContextVar("wanted", default=())


@contextmanager
def needing(*needs: Need) -> Iterator[None]:
    """In the block, whatever is missing is named together with what of `needs` is missing too. Nothing is raised."""
    token = _wanted.set((*_wanted.get(), *needs))
    try:
        yield
    finally:
        _wanted.reset(token)


def of_device(device: str) -> tuple[Need, ...]:
    """What computing on a device needs."""
    return () if device == "cpu" else (need("torch"),)


def of_names(*given: object) -> tuple[Need, ...]:
    """What adapters, bases and outputs need, as far as their names tell: addresses of object stores, GGUF files."""
    found: list[Need] = []
    for name in map(str, filter(None, given)):
        scheme, sign, _ = name.partition("://")
        if sign and (package := OF_SCHEMES.get(scheme.lower())):
            found += [need("fsspec"), Need(None, (package,))]
    return tuple(found)


def of_base(base: object) -> tuple[Need, ...]:
    """The same of a base model."""
    return (*of_names(base), *(GGUF_BASE if str(base).lower().endswith(".gguf") else ()))


def has(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(purpose: str, *needs: Need) -> None:
    """Raise MissingExtraError, which names all that is missing, unless `needs` are met."""
    if any(one.missing for one in needs):
        raise missing(purpose, *needs)


def missing(purpose: str, *needs: Need) -> MissingExtraError:
    """The error for `needs`, of which something is missing, and for what the command is known to need besides."""
    lacking = [one for one in dict.fromkeys((*needs, *_wanted.get())) if one.missing] or list(needs)
    names = sorted({name.replace("_", "-") for one in lacking for name in one.missing or one.modules})
    extras = {one.extra for one in lacking if one.extra is not None}
    extras -= {one for one in extras for other in extras if set(EXTRAS[one]) < set(EXTRAS[other])}
    packages = {name for one in lacking if one.extra is None for name in one.missing or one.modules}
    what = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return MissingExtraError(what, ",".join(sorted(extras)), purpose, install(extras, packages))


def install(extras: Iterable[str], packages: Iterable[str] = ()) -> str:
    """The command that installs `extras` of this package, and other packages, to where this one is."""
    own = f"'fossil-export[{','.join(sorted(extras))}]'" if set(extras) else ""
    home = Path(sys.prefix)
    others = " ".join(sorted(packages))
    if (home / "pipx_metadata.json").is_file():
        steps = (f"pipx install --force {own}" if own else "", f"pipx inject fossil-export {others}" if others else "")
        return " && ".join(filter(None, steps))
    if (home / "uv-receipt.toml").is_file():
        more = "".join(f" --with {name}" for name in others.split())
        return f"uv tool install{more} {own or 'fossil-export'}"
    return " ".join(filter(None, (_pip_install(), own, others)))


def _pip_install() -> str:
    """How packages are installed into this environment."""
    python = shlex.quote(sys.executable or "python")
    if not _is_pip_here():
        return f"uv pip install --python {python}"
    found = shutil.which("pip")
    if found is not None and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "pip install"
    return f"{python} -m pip install"


def _is_pip_here() -> bool:
    """Looked up as a distribution: to look for the module `pip` makes setuptools leave distutils alone from then on."""
    try:
        return bool(version("pip"))
    except PackageNotFoundError:
        return False


def required(package: str, extra: str = "onnx", purpose: str = "working on ONNX graphs") -> Any:
    """Import `package` (a module's name), or raise MissingExtraError that says what to install."""
    try:
        return import_module(package)
    except ImportError as problem:
        root = (problem.name or package).partition(".")[0]
        own = [name for name in EXTRAS[extra] if name in (root, package.partition(".")[0])]
        needs = need(extra, *(own or EXTRAS[extra]))
        if needs.missing:
            raise missing(purpose, needs) from problem
        raise MissingExtraError(root, extra, purpose, install([extra])) from problem


def needs_transformers_5(purpose: str) -> None:
    """Raise FossilExportError if an older transformers is installed, whose parts are others."""
    found = version("transformers")
    if int(found.partition(".")[0]) < 5:
        raise FossilExportError(f"{purpose} needs transformers 5 or later, not {found}: pip install 'transformers>=5'")
