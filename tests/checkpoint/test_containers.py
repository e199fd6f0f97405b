"""States that are containers, as text and leaves, and back."""

import math
from collections import deque

import pytest

from lightning_zero.checkpoint.containers import KEYED, put_together, take_apart, text_of
from lightning_zero.errors import CorruptCheckpointError


def make(value, shape):
    return value if shape is None else (value, shape)


def round_trip(value):
    stored = {}

    def store(name, leaf):
        if not isinstance(leaf, (int, float, str)):
            raise TypeError(type(leaf).__name__)
        stored[name] = leaf
        return name

    description = take_apart("state", value, store)
    texts = {} if description == "state" else {"state": text_of(description)}
    return put_together({**stored, **texts, "other": 5}, make, "here")


VALUES = [
    0,
    [1, [2, 3]],
    [],
    (),
    {},
    [{}],
    (1, "a"),
    {0.9: 1, "b": [2], None: 3, True: 4},
    {1, None},
    deque([1, 2], 2),
    deque([(1,)]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_container_comes_back_as_it_was_and_leaves_nothing_else(value):
    back = round_trip(value)
    assert back == {"state": value, "other": 5}
    assert type(back["state"]) is type(value)
    assert getattr(back["state"], "maxlen", None) == getattr(value, "maxlen", None)


@pytest.mark.parametrize("value", [[{(1, 2)}], {(1, 2): 3}, [range(3)], math], ids=["set", "key", "range", "module"])
def test_what_is_no_container_and_no_leaf_is_left_to_whoever_stores_leaves(value):
    with pytest.raises(TypeError):
        round_trip(value)


def test_a_state_with_keys_that_are_no_names_comes_back_with_them():
    state, keyed = {}, {0: {"ready": {0}}, "b": 2}
    description = take_apart(KEYED, keyed, lambda name, leaf: state.update({name: leaf}) or name)
    assert put_together({**state, KEYED: text_of(description)}, make, "here") == keyed


def test_a_leaf_gets_the_shape_that_the_text_says():
    text = text_of({"tensor": "row[]", "shape": [24]})
    assert put_together({"row": text, "row[]": 7}, make, "here") == {"row": (7, (24,))}


@pytest.mark.parametrize(
    "description",
    [
        {"list": ["gone"]},
        {"list": ["state"]},
        {"set": [[]]},
        {"array": []},
        {},
        3,
        {"list": 3},
        {"tensor": "other", "shape": "x"},
        {"dict": [1]},
        {"dict": [[[1], "other"]]},
        {"deque": [], "maxlen": "a"},
        {"deque": []},
    ],
    ids=repr,
)
def test_a_text_that_was_made_up_is_an_error_that_names_the_state(description):
    with pytest.raises(CorruptCheckpointError, match="here: 'state' can't be put together"):
        put_together({"state": text_of(description), "other": 5}, make, "here")


def test_a_text_that_is_cut_short_or_too_deep_is_the_same_error():
    deep = text_of([])[:-2] + "[" * 100_000
    for text in (text_of({"list": []})[:-1], deep):
        with pytest.raises(CorruptCheckpointError, match="can't be put together"):
            put_together({"state": text}, make, "here")
