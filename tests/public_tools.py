"""The names that the package offers, and a base, an adapter and their merge to call them with."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_adapter, make_base

import fossil_export
from fossil_export import merge

NAMES = [name for name in fossil_export.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter for it, and the model merged of both."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "adapter", make_base(folder / "base"))
    merge(folder / "adapter", folder / "merged")
    return folder
