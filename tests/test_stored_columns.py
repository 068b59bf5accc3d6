"""Columns of a matrix in a file are the same, however many are read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fossil_export.checkpoints._header import Header, read_header
from fossil_export.checkpoints._input import CHEAP, SPAN, InputFile, StoredArray
from fossil_export.errors import CheckpointError

ROWS, COLUMNS = 270, 4 * CHEAP // 4
WIDE = np.arange(ROWS * COLUMNS, dtype=np.int32).reshape(ROWS, COLUMNS)
NARROW = np.arange(3 * SPAN // 16, dtype=np.int32).reshape(-1, 16)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    path = tmp_path_factory.mktemp("columns") / "model.safetensors"
    save_file({"wide": WIDE, "narrow": NARROW}, path)
    return read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_columns_are_those_of_the_matrix(data: st.DataObject, header: Header) -> None:
    info = data.draw(st.sampled_from(header.tensors))
    whole = {"wide": WIDE, "narrow": NARROW}[info.name]
    start = data.draw(st.integers(0, whole.shape[1]))
    stop = data.draw(st.one_of(st.integers(start, whole.shape[1]), st.integers(start, start + 40)))
    file = InputFile(header.path, header)
    assert info.offset is not None
    array = StoredArray(file, info.offset, whole.shape, whole.dtype)
    np.testing.assert_array_equal(array[:, start:stop], whole[:, start:stop])
    file.close()


@pytest.mark.parametrize("columns", [slice(0, 8), slice(0, COLUMNS)])
def test_a_file_that_is_cut_meanwhile_is_refused(columns: slice, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"wide": WIDE}, path)
    header = read_header(path)
    file = InputFile(path, header)
    with path.open("r+b") as cut:
        cut.truncate(header.size // 2)
    array = StoredArray(file, header.tensors[0].offset or 0, WIDE.shape, WIDE.dtype)
    with pytest.raises(CheckpointError, match="changed"):
        array[:, columns]
    file.close()
