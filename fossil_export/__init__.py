"""Take a model fine-tuned with FOSSIL (Bone, DiSHA, MiSS) to where it is used.

>>> import fossil_export
>>> result = fossil_export.merge("my-adapter", "my-model")    # doctest: +SKIP

The commands of `fossil-export` are a thin skin of what is listed in `__all__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fossil_export.version import __version__

if TYPE_CHECKING:
    from fossil_export.adapters import Adapter, load_adapter
    from fossil_export.errors import FossilExportError
    from fossil_export.inspection import Inspection, inspect
    from fossil_export.merging import MergePlan, MergeResult, merge, plan_merge
    from fossil_export.verifying import Verification, verify

_HOMES = {
    "Adapter": "adapters",
    "FossilExportError": "errors",
    "Inspection": "inspection",
    "MergePlan": "merging",
    "MergeResult": "merging",
    "Verification": "verifying",
    "inspect": "inspection",
    "load_adapter": "adapters",
    "merge": "merging",
    "plan_merge": "merging",
    "verify": "verifying",
}

__all__ = [
    "Adapter",
    "FossilExportError",
    "Inspection",
    "MergePlan",
    "MergeResult",
    "Verification",
    "__version__",
    "inspect",
    "load_adapter",
    "merge",
    "plan_merge",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `fossil-export --help` does not wait for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fossil_export.{_HOMES[name]}"), name)
