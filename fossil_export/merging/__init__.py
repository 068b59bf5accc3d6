"""Base and adapter become one plain checkpoint: plan, run, record."""

from fossil_export.merging._merge import MergeResult, merge, run_merge
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._planning import plan_merge

__all__ = ["MergePlan", "MergeResult", "merge", "plan_merge", "run_merge"]
