"""From one adapter format to another, without the model: a table of converters, one file each."""

from fossil_export.converting._converters import CONVERTERS, Converter

__all__ = ["CONVERTERS", "Converter"]
