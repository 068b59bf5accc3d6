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
    from fossil_export.converting import Conversion, convert
    from fossil_export.errors import FossilExportError
    from fossil_export.inspection import Inspection, inspect
    from fossil_export.merging import MergePlan, MergeResult, merge, plan_merge
    from fossil_export.onnx.export import OnnxResult, export_onnx
    from fossil_export.onnx.plan import OnnxPlan, plan_onnx
    from fossil_export.publishing import (
        PushResult,
        StreamPlan,
        StreamResult,
        merge_to_hub,
        plan_stream,
        publish_certificate,
        push,
    )
    from fossil_export.verifying import Verification, verify

_HOMES = {
    "Adapter": "adapters",
    "Conversion": "converting",
    "FossilExportError": "errors",
    "Inspection": "inspection",
    "MergePlan": "merging",
    "MergeResult": "merging",
    "OnnxPlan": "onnx.plan",
    "OnnxResult": "onnx.export",
    "PushResult": "publishing",
    "StreamPlan": "publishing",
    "StreamResult": "publishing",
    "Verification": "verifying",
    "convert": "converting",
    "export_onnx": "onnx.export",
    "inspect": "inspection",
    "load_adapter": "adapters",
    "merge": "merging",
    "merge_to_hub": "publishing",
    "plan_merge": "merging",
    "plan_onnx": "onnx.plan",
    "plan_stream": "publishing",
    "publish_certificate": "publishing",
    "push": "publishing",
    "verify": "verifying",
}

__all__ = [
    "Adapter",
    "Conversion",
    "FossilExportError",
    "Inspection",
    "MergePlan",
    "MergeResult",
    "OnnxPlan",
    "OnnxResult",
    "PushResult",
    "StreamPlan",
    "StreamResult",
    "Verification",
    "__version__",
    "convert",
    "export_onnx",
    "inspect",
    "load_adapter",
    "merge",
    "merge_to_hub",
    "plan_merge",
    "plan_onnx",
    "plan_stream",
    "publish_certificate",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `fossil-export --help` does not wait for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fossil_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
