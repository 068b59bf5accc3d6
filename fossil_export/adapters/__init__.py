"""What was trained: every file format becomes one `Adapter`."""

from fossil_export.adapters.adapter import Adapter, Shard
from fossil_export.adapters.peft import load_adapter

__all__ = ["Adapter", "Shard", "load_adapter"]
