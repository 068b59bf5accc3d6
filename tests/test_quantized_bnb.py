"""Bases in bitsandbytes' 4 and 8 bits, against the real library's code for CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_bases import merged_equal
from quantized_bnb import bnb_folder


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("nf4", "bfloat16", {"blocksize": 64, "compress_statistics": True}),
        ("fp4", "float16", {"blocksize": 128}),
        ("int8", "bfloat16", {}),
    ],
)
def test_a_merge_is_that_of_the_dequantized_base(
    kind: str, dtype: str, options: dict[str, object], tmp_path: Path
) -> None:
    merged_equal(*bnb_folder(tmp_path, kind, dtype, **options), tmp_path)
