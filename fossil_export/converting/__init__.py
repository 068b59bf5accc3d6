"""From one adapter format to another, without the model: one table of targets."""

from fossil_export.converting.api import TARGETS, Conversion, convert

__all__ = ["TARGETS", "Conversion", "convert"]
