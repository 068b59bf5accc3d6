"""Base and adapter become one plain checkpoint: plan, run, record."""

from fossil_export.merging._digest import PlanDigest, plan_digest
from fossil_export.merging._finish import Finished, finish
from fossil_export.merging._layout import FilePlan
from fossil_export.merging._merge import MergeResult, merge, run_merge
from fossil_export.merging._parts import PartResult, finish_merge, merge_part
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge, settled
from fossil_export.merging._run import FileResult, merge_file

__all__ = [
    "FilePlan",
    "FileResult",
    "Finished",
    "MergePlan",
    "MergeResult",
    "PartResult",
    "PlanDigest",
    "finish",
    "finish_merge",
    "merge",
    "merge_file",
    "merge_part",
    "plan_digest",
    "plan_merge",
    "run_merge",
    "settled",
]
