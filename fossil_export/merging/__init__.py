"""Base and adapter become one plain checkpoint: plan, run, record."""

from fossil_export.merging.api import MergeResult, merge
from fossil_export.merging.plan import MergePlan
from fossil_export.merging.planning import plan_merge

__all__ = ["MergePlan", "MergeResult", "merge", "plan_merge"]
