"""Where models and adapters come from."""

from fossil_export.hub.resolve import expanded, resolve

__all__ = ["expanded", "resolve"]
