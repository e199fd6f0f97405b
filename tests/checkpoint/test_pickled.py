"""Pickles as descriptions: what is read and written again makes what it would have made, and nothing is imported."""

import argparse
import collections
import copyreg
import decimal
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.data import AttributeDict

from lightning_zero.checkpoint.pickled import Global, Object, Ordered, Pickled, read_pickle, write_pickle


def no_id(value: object) -> None:
    return None


def refuse(value: object) -> Any:
    raise AssertionError(value)


def as_object(pid: object) -> Object:
    return Object(pickle.REDUCE, pid, ())


def described(value: object) -> Pickled:
    return read_pickle(pickle.dumps(value, 2), refuse)


def again(value: object) -> Any:
    """Through a description, and back."""
    return pickle.loads(write_pickle(described(value).value, no_id, refuse))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9)
    | st.sampled_from([2**7, 2**8, 2**15, 2**16, 2**31, -(2**31), -(2**31) - 1, 2**2040, "x" * 300]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.text(), st.integers()), inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
    max_leaves=30,
)


@given(PLAIN)
def test_whatever_is_plain_comes_back(value: object) -> None:
    assert again(value) == value
    assert repr(again([value, value])) == repr([value, value])


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_pickle_dump_writes_by_default_is_read_too(protocol: int) -> None:
    named, text = argparse.Namespace(a=[1, "x" * 300], b=(2.5, None)), "ä"
    value = {"of a class": named, "again": [named, named], text: {text: text}, 2**40: collections.OrderedDict(x=1)}
    found = read_pickle(pickle.dumps(value, protocol), refuse)
    made = pickle.loads(write_pickle(found.value, no_id, refuse))
    assert made == value
    assert made["again"][0] is made["of a class"]
    assert found.unusual  # `torch.load(weights_only=True)` reads no such thing
    assert Global("argparse", "Namespace") in found.names


def test_a_key_may_be_as_long_as_it_is_written() -> None:
    value = {tuple(range(10_000)): 1, ("x",) * 500: 2, ((1, 2), (3,)): 3}
    assert again(value) == value


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Namer(list[int]):
    """A list with attributes."""


class Setter:
    """What it holds is set by a function, which is called for its effect."""

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return Setter, (), {"value": self.value}, None, None, set_value


def set_value(target: Setter, state: dict[str, object]) -> None:
    target.value = state["value"]


def test_what_a_training_keeps_comes_back() -> None:
    named = Namer([1, 2])
    named.label = "x"  # type: ignore[attr-defined]
    slots = Slots()
    slots.a = 7
    default = collections.defaultdict(list, a=[1])
    value = {
        "namespace": argparse.Namespace(lr=1e-3, names=["a", "b"]),
        "attributes": AttributeDict(a=1, b=AttributeDict(c=2)),
        "sets": [{1, 2}, frozenset((3,)), set()],
        "numpy": [np.float64(1.5), np.int32(7), np.arange(6).reshape(2, 3), np.dtype("float32")],
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("hello"),
        "default": default,
        "path": Path("a/b"),
        "decimal": decimal.Decimal("1.5"),
        "complex": 1 + 2j,
        "range": range(3),
        "function": sorted,
        "class": argparse.Namespace,
        "method": dict.fromkeys,
        "bytes": [b"\x00\xff", bytearray(b"x")],
        "deque": collections.deque([1, 2], 3),
        "namespace of types": types.SimpleNamespace(x=[1]),
    }
    loaded = again(value)
    assert {k: v for k, v in loaded.items() if k != "numpy"} == {k: v for k, v in value.items() if k != "numpy"}
    assert [type(item) for item in loaded.values()] == [type(item) for item in value.values()]
    assert repr(loaded["numpy"]) == repr(value["numpy"])
    assert loaded["default"]["new"] == []
    named_again, slots_again, setter = again([named, slots, Setter([1])])
    assert (list(named_again), named_again.label, slots_again.a, setter.value) == ([1, 2], "x", 7, [1])


def test_what_is_shared_stays_shared_and_circles_close() -> None:
    shared = [1]
    value: dict[str, Any] = {"a": shared, "b": (shared, argparse.Namespace(x=shared))}
    value["itself"] = value
    value["object"] = argparse.Namespace(back=value)
    in_itself: tuple[list[Any]] = ([],)
    in_itself[0].append(in_itself)
    long_in_itself: tuple[Any, ...] = ([], 1, 2, 3)
    long_in_itself[0].append(long_in_itself)
    loaded, short, long = again((value, in_itself, long_in_itself))
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1].x
    assert loaded["itself"] is loaded is loaded["object"].back
    assert short[0][0] is short
    assert long[0][0] is long


def test_what_is_deep_or_shared_without_end_is_read_and_written_once() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    content = b"\x80\x02" + b"]" * 100_001 + b"a" * 100_000 + b"."
    assert len(write_pickle(read_pickle(content, refuse).value, no_id, refuse)) < 10**6
    tuples = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    assert write_pickle(read_pickle(tuples, refuse).value, no_id, refuse).count(b"\x85") >= 200_000
    laughs: Any = ["ha"]
    for _ in range(200):
        laughs = [laughs, laughs]
    assert len(write_pickle(described(laughs).value, no_id, refuse)) < 5000


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that can't be imported unnoticed."""
    (tmp_path / "trap_of_a_pickle.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert "trap_of_a_pickle" not in sys.modules


TRAP = b"ctrap_of_a_pickle\nx.y\n"
HOSTILE: dict[str, bytes] = {
    "a name": TRAP,
    "a call": TRAP + b")R",
    "a call of a call": TRAP + b")R)R",
    "a new object": TRAP + b")\x81",
    "a state": TRAP + b")R}b",
    "items": TRAP + b")R(K\x01K\x02e",
    "keys": TRAP + b")R(K\x01K\x02u",
    "a name for a key": b"}" + TRAP + b"K\x01s",
    "a persistent id": TRAP + b"Q",
    "a name on the stack": b"\x8c\x10trap_of_a_pickle\x8c\x03x.y\x93",
    "a call of a name on the stack": b"\x8c\x10trap_of_a_pickle\x94\x8c\x03x.y\x93\x94)R\x94",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_is_imported_for(what: str, trap: Path) -> None:
    found = read_pickle(b"\x80\x02" + HOSTILE[what] + b".", as_object)
    assert found.names == {Global("trap_of_a_pickle", "x.y")}
    assert TRAP in write_pickle(found.value, no_id, refuse)


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "INST": b"(itrap_of_a_pickle\nx\n.",
    "OBJ": b"(" + TRAP + b"o.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "a name of numbers": b"K\x01K\x02\x93.",
    "a name of two lines": b"\x8c\x04os\nx\x8c\x05mkdir\x93.",
    "a name of half a character": b"\x8c\x02os\x8c\x03\xed\xa0\x80\x93.",
    "a frame without an end": b"\x95\x01\x00\x00",
    "NEWOBJ_EX": TRAP + b")}\x92.",
    "a text id": b"Px\n.",
    "a number in decimals": b"I" + b"9" * 10**6 + b"\n.",
    "a name without an end": b"cos",
    "a name that is no text": b"c\xff\n\xff\n.",
    "a string of four gigabytes": b"X\xff\xff\xff\xffx.",
    "a number of two gigabytes": b"\x8b\xff\xff\xff\x7f1.",
    "a call of a number": b"K\x01)R.",
    "a call with a list": TRAP + b"]R.",
    "a call of nothing": b")R.",
    "a state of a list": b"]}b.",
    "a state of a name": TRAP + b"}b.",
    "items of a name": TRAP + b"(K\x01e.",
    "items of a tuple": b")(K\x01e.",
    "keys of a list": b"](K\x01K\x02u.",
    "a key without a value": b"}(K\x01u.",
    "a key that is a list": b"}]K\x01s.",
    "a key that is a dict": b"}}K\x01s.",
    "a mark that isn't there": b"t.",
    "what lies under a mark": b"K\x01(\x85.",
    "a memo that isn't there": b"h\x07.",
    "what isn't there into the memo": b"q\x07.",
    "a pop of nothing": b"0.",
    "a call that is thrown away": TRAP + b")R0K\x01.",
    "tuples of tuples for a key": b"})" + b"\x85" * 200_000 + b"K\x01s.",
    "a long tuple for many keys": b"}(" + b"K\x01" * 9000 + b"tq\x000(" + b"h\x00\x85K\x01" * 9000 + b"u.",
    "every path through tuples for a key": b"}K\x01q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_nothing_comes_of(what: str, trap: Path) -> None:
    copyreg.add_extension("trap_of_a_pickle", "x", 1)
    try:
        with pytest.raises((pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError)):
            read_pickle(b"\x80\x02" + MALFORMED[what], refuse)
    finally:
        copyreg.remove_extension("trap_of_a_pickle", "x", 1)


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 4))
def test_any_bytes_come_out_as_an_error_or_can_be_written_again(new: bytes, position: int, count: int) -> None:
    whole = pickle.dumps([{"a": (1, 2.5)}, collections.OrderedDict(x=1), argparse.Namespace(b={1, 2})], 2)
    position %= len(whole)
    try:
        found = read_pickle(
            whole[:position] + new + whole[position + count :], lambda pid: Object(pickle.REDUCE, pid, ())
        )
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError, TypeError):
        return
    write_pickle(found.value, no_id, refuse)


def test_an_ordered_dict_can_be_edited_as_the_dict_that_it_is() -> None:
    found = described({"x": collections.OrderedDict(a=1)})
    assert isinstance(found.value["x"], Ordered)
    found.value["x"]["b"] = 2
    assert pickle.loads(write_pickle(found.value, no_id, refuse)) == {"x": collections.OrderedDict(a=1, b=2)}
    assert found.names == {Global("collections", "OrderedDict")}
    assert not found.unusual
    assert described(AttributeDict(a=1)).unusual
