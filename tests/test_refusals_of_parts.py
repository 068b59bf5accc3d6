"""Refusals of readers' small parts, and what they take at the very edge."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fossil_export.checkpoints._header import encode_header
from fossil_export.checkpoints.pickled._machine import BadPickleError, Call, Name, Persistent
from fossil_export.checkpoints.pickled._state import tensors_of
from fossil_export.checkpoints.quantized._levels import reciprocal
from fossil_export.errors import FossilExportError
from fossil_export.merging._engine import NumpyEngine, Update, merge_slab
from fossil_export.merging._given import with_weights
from fossil_export.merging._requantize import refuse_added, refuse_lost
from fossil_export.merging._survival import group_rows, measure
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


def test_loha_with_cores_of_other_ranks_is_refused() -> None:
    good = {"A1": (2, 6), "B1": (2, 4), "T1": (2, 2, 3, 3), "A2": (2, 6), "B2": (2, 4), "T2": (2, 2, 3, 3)}
    assert METHODS["loha"].read({"r": 2}, "m", good, "here") == {"r": 2, "scale": 4.0}
    for role, place in itertools.product(("T1", "T2"), (0, 1)):
        wrong = [*good[role]]
        wrong[place] = 3
        with pytest.raises(FossilExportError, match="they do not go together"):
            METHODS["loha"].read({"r": 2}, "m", good | {role: tuple(wrong)}, "here")


@pytest.mark.parametrize("first", [(2,), (2, 2, 1)])
def test_lokr_whose_first_factor_is_no_matrix_is_refused(first: tuple[int, ...]) -> None:
    with pytest.raises(FossilExportError, match="they do not go together"):
        METHODS["lokr"].read({"r": 2}, "m", {"W1": first, "W2": (3, 3)}, "here")


def test_a_lokr_without_ranks_takes_the_only_one_of_its_patterns() -> None:
    shapes = {"W1": (2, 2), "W2": (3, 3)}
    for pattern in ({"m": 3}, {"m": 3, "a.m": 3}):
        assert METHODS["lokr"].read({"r": 2, "rank_pattern": pattern}, "a.m", shapes, "here")["r"] == 3
    with pytest.raises(FossilExportError, match="rank_pattern has several values for it"):
        METHODS["lokr"].read({"r": 2, "rank_pattern": {"m": 3, "a.m": 4}}, "a.m", shapes, "here")


@pytest.mark.parametrize("weight", [(4, 9), (9, 4)])
def test_kasa_must_leave_something_of_the_shorter_side(weight: tuple[int, int]) -> None:
    for rank in (3, 4):
        shapes = {"A": (rank, weight[1]), "B": (weight[0], rank), "d": (rank,)}
        found = METHODS["kasa"].mismatch(shapes, {"r": rank}, weight)
        assert found == (None if rank == 3 else "kasa of rank 4 leaves nothing of the weight")


@pytest.mark.parametrize("kind", [Name("torch", "Tensor"), Name("other", "Packed")])
def test_a_tensor_of_another_librarys_class_is_refused(kind: Name) -> None:
    storage = Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6))
    plain = (storage, 0, (2, 3), (3, 1), False, {})
    arguments = (Name("torch._utils", "_rebuild_tensor_v2"), kind, plain, {})
    state = {"a": Call(Name("torch._tensor", "_rebuild_from_type_v2"), arguments)}
    if kind.module == "torch":
        assert [one.shape for one in tensors_of(state)] == [(2, 3)]
    else:
        with pytest.raises(BadPickleError, match=r"is a other\.Packed, which only its own library can read"):
            list(tensors_of(state))


def test_fields_that_a_config_lacks_have_pefts_defaults() -> None:
    peft = pytest.importorskip("peft")
    without = {"use_cayley_neumann"}  # PEFT had no such series when its configs lacked the field
    compared = 0
    for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name, method in METHODS.items():
            for key, field in method.FIELDS.items() if kind.value in method.PEFT else ():
                if key in without:
                    continue
                if field.default is not None and defaults.get(key, dataclasses.MISSING) is not dataclasses.MISSING:
                    assert field.default == defaults[key], (name, key)
                    compared += 1
    assert compared > 40


def test_only_matrices_need_to_be_there_to_be_quantized_again() -> None:
    base: Any = SimpleNamespace(location="base")
    vector, matrix = (SimpleNamespace(name="a.bias", shape=shape) for shape in ((3,), (3, 3)))
    refuse_added(base, [vector])  # type: ignore[list-item]
    with pytest.raises(FossilExportError, match=r"has no a\.bias"):
        refuse_added(base, [vector, matrix])  # type: ignore[list-item]


def test_what_is_left_of_the_update_is_told_of_what_was_quantized_again_alone() -> None:
    tensors = [SimpleNamespace(name="a", encodes=object()), SimpleNamespace(name="b", encodes=None)]
    plan: Any = SimpleNamespace(min_survival=0.5, tensors=tensors, base_name="base")
    whole, lost = (measure(np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 4), share)) for share in (1.0, 0.0))
    refuse_lost(plan, {"a": whole, "b": lost})
    with pytest.raises(FossilExportError, match=r"keep 0\.0% of the update \(least in a\)"):
        refuse_lost(plan, {"a": lost, "b": whole})


def test_what_is_measured_does_not_depend_on_how_much_is_merged_at_once() -> None:
    random = np.random.default_rng(0)
    weight, shard = (random.standard_normal(shape).astype(np.float32) for shape in ((256, 8), (2, 256)))
    engines = NumpyEngine(), NumpyEngine()
    engines[1].block = 1
    updates = [Update(METHODS["tile"], {"D": shard}, {})]
    one, other = (merge_slab(engine, weight, np.empty_like(weight), updates, 0, 256)[0] for engine in engines)
    assert one.survived is not None and one == other


@pytest.mark.parametrize("unit", [1, 2, 3, 7, 100])
def test_sampled_rows_are_whole_units(unit: int) -> None:
    assert group_rows(unit) % unit == 0 and unit <= group_rows(unit)


def test_the_reciprocal_of_every_scale_is_found() -> None:
    scales = (np.arange(1024, dtype=np.uint32) << 13 | 0x3F800000).view(np.float32)
    assert np.allclose(reciprocal(scales) * scales, 1, rtol=0, atol=1e-6)
