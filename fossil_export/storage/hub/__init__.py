"""Where models and adapters come from: what the user typed becomes files, here or on the Hub."""

from fossil_export.storage.hub.resolve import Located, expanded, locate, names_hub, pinned, resolve

__all__ = ["Located", "expanded", "locate", "names_hub", "pinned", "resolve"]
