"""The reader of pickles reads what Python's own reads, and calls nothing."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fossil_export.checkpoints.pickled._machine import ATTRIBUTES, BadPickleError, Call, CutError, Name, read_pickle

KEYS = st.one_of(st.text(max_size=5), st.integers(-300, 1 << 70), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(KEYS, st.floats(allow_nan=False), st.binary(max_size=3), st.integers(1 << 15, 1 << 17)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)
LONG = ["x" * 300, b"y" * 300, [*range(300)], {str(n): [n] for n in range(300)}]


def plain(value: Any) -> Any:
    """Ordered dicts as dicts, which is how they are read; what has one type and another in Python stays told apart."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return (type(value).__name__, value)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.sampled_from([2, 3, 4, 5]), st.binary(max_size=3))
def test_what_python_pickles_is_read_as_python_reads_it(value: Any, protocol: int, before: bytes) -> None:
    data = pickle.dumps([value, value, *([LONG] if not before else [])], protocol)
    if protocol == 2 and (b"_codecs" in data or b"__builtin__" in data):
        return  # bytes, which are calls there
    found, end = read_pickle(before + data + b"after", len(before))
    assert plain(found) == plain(pickle.loads(data)) and end == len(before + data)


class Other:
    def __reduce__(self) -> tuple[Any, ...]:
        return pickletools.dis, (b"called",), {"a": 1}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_calls_come_out_as_calls(protocol: int) -> None:
    found, _ = read_pickle(pickle.dumps({"a": Other(), "b": pickle.loads}, protocol))
    call = Call(Name("pickletools", "dis"), (b"called",))
    assert found == {"a": Call(ATTRIBUTES, (call, {"a": 1})), "b": Name("_pickle", "loads")}


@pytest.mark.parametrize("protocol", range(1, 6))
def test_a_cut_pickle_is_told_as_cut_wherever_it_is_cut(protocol: int) -> None:
    data = pickle.dumps({"a": ["b" * 10, 1.5, 70000, (1, 2, 3, 4)], "c": pickle.loads, "b": None}, protocol)
    starts = {place for _, _, place in pickletools.genops(data)}
    for end in range(len(data)):
        with pytest.raises(CutError, match="is cut: its pickle has no end" if end in starts else "is cut"):
            read_pickle(data[:end])


@pytest.mark.parametrize(
    "data",
    [
        b".",
        b"0.",
        b"(.",
        b"(0N.",
        b"N\x85\x86.",
        b"(N\x86.",
        b"e.",
        b"1.",
        b"Nt.",
        b"N(Ne.",
        b"}(Nu.",
        b"N(NNu.",
        b"Nb.",
        b"NNNs.",
        b"NN\x93.",
        b"h\x01.",
        b"NNR.",
        b"}NNas.",
    ],
)
def test_a_pickle_that_takes_what_is_not_there_is_no_sound_one(data: bytes) -> None:
    with pytest.raises(BadPickleError):
        print(read_pickle(data))
