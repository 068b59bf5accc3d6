"""What was trained: every file format becomes one `Adapter`."""

from fossil_export.adapters._adapter import Adapter
from fossil_export.adapters._peft import load_adapter
from fossil_export.adapters._trained import Trained

__all__ = ["Adapter", "Trained", "load_adapter"]
