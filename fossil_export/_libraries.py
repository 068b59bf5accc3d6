"""Libraries that other libraries import without being asked, tamed before that."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock
from typing import Any, NoReturn

_HUB_KERNELS, _FOUND = "transformers.integrations.hub_kernels", "transformers.utils.import_utils"
_lock = Lock()
_blocks = 0
_hidden = ExitStack()


def tame_bitsandbytes() -> None:
    """Import bitsandbytes if it is installed, without what it fetches and says.

    transformers and PEFT import it if they find it. It then has `kernels`, if that is installed too, fetch code of the
    Hub and run it (backends/cpu/ops.py), or says on stderr what it is not as fast as.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with without_kernels(), suppress(Exception):  # who needs it will say what is wrong with it
            importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let transformers find no `kernels`: by that package it fetches code of the Hub and runs it.

    A config need not ask for that: Mamba-like classes do when they are made, others when they run. All threads of the
    process are without it until the last block ends. If transformers is first imported in a block, it stays without.
    """
    global _blocks, _hidden
    with _lock:
        if not _blocks:
            _hidden = _hide()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                _hidden.close()


def _hide() -> ExitStack:
    """Hide it, from a transformers that has it already too; closing what is returned undoes that."""
    stack = ExitStack()
    hub = sys.modules.get(_HUB_KERNELS)
    if hub is not None:
        stack.callback(_forget)
        if isinstance(loaded := getattr(hub, "_KERNEL_MODULE_MAPPING", None), dict):
            stack.callback(_restore, loaded, dict(loaded))  # what is not found here is looked for again later
        for name, value in (("_kernels_available", False), ("get_kernel_hub", _refuse)):
            if hasattr(hub, name):  # the first of them only before transformers 5.2
                stack.callback(setattr, hub, name, getattr(hub, name))
                setattr(hub, name, value)
    modules: dict[str, Any] = sys.modules
    if (known := modules.get("kernels")) is not None:
        stack.callback(modules.__setitem__, "kernels", known)
    stack.callback(modules.pop, "kernels", None)
    modules["kernels"] = None
    _forget()
    return stack


def _restore(mapping: dict[str, Any], before: dict[str, Any]) -> None:
    mapping.clear()
    mapping.update(before)


def _forget() -> None:
    """Let transformers look for the package again."""
    found: Any = getattr(sys.modules.get(_FOUND), "is_kernels_available", None)
    if hasattr(found, "cache_clear"):
        found.cache_clear()


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise FileNotFoundError(f"{name}: kernels of the Hub are not run here")


@contextmanager
def without_panics() -> Iterator[None]:
    """Raise ValueError for a panic of a library that is written in Rust, which is no Exception of Python's, and keep
    what it then prints to itself, as all that is printed to stderr meanwhile."""
    with ExitStack() as stack:
        with suppress(OSError):  # there may be no stderr
            before = os.dup(2)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, 2)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, nowhere)
            os.dup2(nowhere, 2)
        try:
            yield
        except BaseException as problem:
            if type(problem).__name__ != "PanicException":
                raise
            raise ValueError(str(problem)) from problem


def config_class() -> Any:
    """The class of all configs of transformers, which has another name before transformers 5."""
    import transformers

    return getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
