"""What a format of quantized weights is: which checkpoints are in it, and how their floats are had."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export._spellings import dtype_named
from fossil_export.checkpoints._coding import Coding
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from fossil_export.checkpoints.layouts import ReadRows

    Array = np.ndarray[Any, Any]

KEYS = ("quantization_config", "compression_config")
"""Where a config says how the model is quantized (the second one: older compressed-tensors)."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it is stored, while its quantization is told: `where` it lies, its tensors, config and the
    `settings` that the config has for the quantization (None without any), how small tensors are read, and what the
    headers of all its files have as `metadata`."""

    where: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    rows_of: ReadRows
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The config's `quant_method`."""
        found = (self.settings or {}).get("quant_method")
        return found if isinstance(found, str) else None

    def values(self, info: TensorInfo) -> Array:
        """A whole stored tensor; for small ones."""
        found: Array = self.rows_of(replace(info, shape=info.shape or (1,)), 0, info.shape[0] if info.shape else 1)[:]
        return found

    def names(self, key: str) -> list[str]:
        """The names that the settings list under `key`; none if it is not there. Raises CheckpointError."""
        found = (self.settings or {}).get(key)
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise self.error(key, f"is {found!r} in config.json, not a list of names; mend it")
        return found

    def error(self, info: TensorInfo | str, problem: str) -> CheckpointError:
        """What to raise for a tensor of it."""
        name, where = (info, self.where) if isinstance(info, str) else (f"{info.name} {list(info.shape)}", info.path)
        return CheckpointError(f"{where}: {name} {problem}")


class Format(Protocol):
    def describes(self, stored: Stored) -> bool:
        """Whether the checkpoint is in this format, by its config, or by the names of its tensors."""

    def read(self, stored: Stored) -> Iterator[TensorInfo]:
        """Its quantized weights as floats: each a tensor with a plain name, dtype, shape and `coding` (`coded`).

        Only headers and small tensors are read. Raises CheckpointError, naming the tensor, for one that is damaged or
        contradicts the settings.
        """

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        """Whether a stored tensor that no weight takes has no meaning in the dequantized model."""

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the dequantized model."""

    def plain_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The metadata in the header of a file of the dequantized model."""


class BaseFormat:
    """What most formats share."""

    def passes_over(self, info: TensorInfo, stored: Stored) -> bool:
        return False

    def plain_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        return dict(metadata)

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Without the settings of the quantization, wherever they are."""
        found = copy.deepcopy(dict(config))
        for part in (found, *(value for value in found.values() if isinstance(value, dict))):
            for key in KEYS:
                part.pop(key, None)
        return found


def settings_of(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What a config says of the quantization, at its top or in one of its parts; None if it says nothing."""
    for part in (config or {}, *(value for value in (config or {}).values() if isinstance(value, dict))):
        for key in KEYS:
            if isinstance(part.get(key), dict):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def coded(name: str, dtype: str, shape: tuple[int, ...], coding: Coding) -> TensorInfo:
    """The weight `name` that a coding gives."""
    path: Path = coding.stored[0].path
    return TensorInfo(name, dtype, shape, path, None, coding=coding)


def float_dtype(config: Mapping[str, Any], otherwise: str = "BF16") -> str:
    """The dtype that a config names for the model ("BF16"), `otherwise` if it names none."""
    from fossil_export.checkpoints._dtypes import BY_TORCH_NAME

    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if (found := dtype_named(part.get(key))) is not None:
                return BY_TORCH_NAME[found]
    return otherwise
