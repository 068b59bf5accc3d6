"""The kinds of artifact: one table, and the files of an artifact that belong to it."""

from fossil_export.artifacts._kind import Kind
from fossil_export.artifacts._kinds import KINDS

__all__ = ["KINDS", "Kind"]
