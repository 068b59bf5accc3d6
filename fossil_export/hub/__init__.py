"""Where models and adapters come from."""

from fossil_export.hub.resolve import resolve

__all__ = ["resolve"]
