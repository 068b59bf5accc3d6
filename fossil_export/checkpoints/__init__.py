"""Where weights lie: safetensors headers, indexes, byte ranges, folders. No mathematics."""

from fossil_export.checkpoints._header import TensorInfo

__all__ = ["TensorInfo"]
