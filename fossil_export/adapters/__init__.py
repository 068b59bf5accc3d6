"""What was trained: every file format becomes one `Adapter`."""

from fossil_export.adapters.adapter import Adapter
from fossil_export.adapters.peft import load_adapter
from fossil_export.adapters.trained import Trained

__all__ = ["Adapter", "Trained", "load_adapter"]
