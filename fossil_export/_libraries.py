"""Libraries that other libraries import without being asked, tamed before that."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from contextlib import suppress


def tame_bitsandbytes() -> None:
    """Import bitsandbytes if it is installed, without what it fetches and says.

    transformers and PEFT import it if they find it. It then has `kernels`, if that is installed too, fetch code of the
    Hub and run it (backends/cpu/ops.py), or says on stderr what it is not as fast as.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes")
    level, known = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with suppress(Exception):  # who needs it will say what is wrong with it
            importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known
