"""A head that was trained whole is compared with the graph's constants, value by value."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from conftest import make_adapter
from peft import LoraConfig

from fossil_export import load_adapter
from fossil_export.verifying._constants import check_saved


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_a_whole_tensor_of_a_graph_is_compared(dtype: type, turned: bool, base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "lora", base, kind=LoraConfig, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = load_adapter(tmp_path / "lora")
    head = adapter.array(adapter.saved["lm_head.weight"]).astype(dtype)

    def graph(*arrays: np.ndarray) -> SimpleNamespace:
        values = [ir.Value(name=str(number), const_value=ir.tensor(array)) for number, array in enumerate(arrays)]
        return SimpleNamespace(graph=SimpleNamespace(initializers={str(value.name): value for value in values}))

    there = head.T.copy() if turned else head
    other = np.zeros_like(there)
    assert list(check_saved(graph(other, there), adapter)) == []
    assert list(check_saved(graph(np.zeros((3, 3), np.float32)), adapter)) == []  # it lies as codes
    there = there.copy()
    there[5, 7] += there.dtype.type(0.5)
    assert list(check_saved(graph(other, there), adapter)) == ["lm_head.weight: is not in the graph as it was trained"]
