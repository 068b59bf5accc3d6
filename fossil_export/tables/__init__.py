"""The commands' results as short tables on a terminal."""

from fossil_export.tables._exits import (
    print_conversion,
    print_export,
    print_onnx_plan,
    print_push,
    print_push_plan,
    print_push_too,
    print_verification,
)
from fossil_export.tables._inspection import print_inspection
from fossil_export.tables._merging import (
    print_moves,
    print_part,
    print_part_plan,
    print_plan,
    print_plan_summary,
    print_result,
    print_streamed,
)

__all__ = [
    "print_conversion",
    "print_export",
    "print_inspection",
    "print_moves",
    "print_onnx_plan",
    "print_part",
    "print_part_plan",
    "print_plan",
    "print_plan_summary",
    "print_push",
    "print_push_plan",
    "print_push_too",
    "print_result",
    "print_streamed",
    "print_verification",
]
