"""The task that an adapter was trained for, as PEFT names it."""

from __future__ import annotations

from fossil_export.adapters import Adapter
from fossil_export.errors import AdapterError

_KNOWN = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""TaskType in peft/utils/peft_types.py."""


def task_of(adapter: Adapter) -> str | None:
    """Its `task_type`. Raises AdapterError for one that PEFT does not know, for it refuses to load that."""
    task = adapter.config.get("task_type")
    if task is not None and task not in _KNOWN:
        raise AdapterError(
            f"{adapter.path}: adapter_config.json: task_type is {task!r}, which PEFT refuses; make it one of "
            f"{', '.join(_KNOWN)}, or null"
        )
    return task
