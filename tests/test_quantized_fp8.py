"""Bases in block-scaled fp8, against transformers' own dequantization."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_bases import fp8_folder, merged_equal


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_a_merge_is_that_of_the_dequantized_base(scale: str, tmp_path: Path) -> None:
    merged_equal(*fp8_folder(tmp_path, scale), tmp_path)
