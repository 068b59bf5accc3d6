"""Refusals of readers' small parts, and what they take at the very edge."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints.pickled._machine import BadPickleError, Call, Name, Persistent
from fossil_export.checkpoints.pickled._state import tensors_of
from fossil_export.errors import FossilExportError
from fossil_export.merging._given import with_weights
from fossil_export.methods import METHODS


def test_a_header_without_metadata_is_that_of_safetensors() -> None:
    wanted = save({"a": np.zeros((2, 3), np.float32)})
    assert encode_header([("a", "F32", (2, 3))], {}) + bytes(24) == wanted


@pytest.mark.parametrize("weights", [[float("inf"), 1], [1, float("nan")], [1], [1, 1, 1]])
def test_a_finite_number_for_each_adapter(weights: list[float]) -> None:
    with pytest.raises(FossilExportError, match="expected a finite number for each of 2 adapters"):
        with_weights(["one", "two"], weights)


@pytest.mark.parametrize("module", ["torch", "other"])
def test_a_dtype_of_another_library_is_none(module: str) -> None:
    storage = Persistent(("storage", Name("torch", "UntypedStorage"), "0", "cpu", 24))
    arguments = (storage, 0, (2, 3), (3, 1), False, {}, Name(module, "uint16"), {})
    state = {"a": Call(Name("torch._utils", "_rebuild_tensor_v3"), arguments)}
    if module == "torch":
        assert [one.dtype for one in tensors_of(state)] == ["U16"]
    else:
        with pytest.raises(BadPickleError, match=r"is of the dtype other\.uint16"):
            list(tensors_of(state))


def test_randlora_of_other_dimensions_is_refused() -> None:
    good = {"A": (4, 1, 8), "B": (6, 2, 4), "l": (4, 2), "g": (2, 8)}
    for role in good:
        shapes = good | {role: (*good[role], 1)}
        with pytest.raises(FossilExportError, match="these do not go together"):
            METHODS["randlora"].read({"r": 4}, "m", shapes, "here")


def test_gralora_takes_a_hybrid_rank_of_nought() -> None:
    field = METHODS["gralora"].FIELDS["hybrid_r"]
    assert field.holds(0) and field.holds(1) and not field.holds(-1) and field.default == 0
