"""Optimizer states that are lists, tuples, dicts, sets or deques: SOAP's preconditioners, AggMo's momenta.

A checkpoint knows tensors and plain values, each by its name. So what is in a container is stored under names of its
own (`GG[0]`, `GG[1]`), as any other state is, and under the container's own name there is a text, in JSON, that says
what is put together out of them. Each tensor can thus still be read in part and for itself. No torch here.

A tensor with as many elements as its parameter and another shape (the row factor, of shape (24,), of a (24, 1) matrix)
would be taken for an element-wise one, and get the parameter's shape. It has such a text too, with its own shape.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_zero.checkpoint.manifest import PLAIN
from lightning_zero.errors import CorruptCheckpointError

KEYED = "lightning_zero_keyed"
"""The name of a state whose keys aren't all names: a dict, and what was a parameter's whole state."""

_BEGINNING = "lightning_zero_container "
"""How such a text begins, so that it isn't taken for a value of the optimizer's own."""


def take_apart(name: str, value: Any, store: Callable[[str, Any], Any]) -> Any:
    """What describes a state: what `store` says of a leaf, or for a container, that of all that is in it.

    Args:
        name: of the state.
        value: a container, or a leaf.
        store: called with the name and the value of each leaf; says where it is; raises TypeError where it can't be
            stored.
    """
    if type(value) in (list, tuple, deque):
        items = [take_apart(f"{name}[{index}]", item, store) for index, item in enumerate(value)]
        return {type(value).__name__: items, **({"maxlen": value.maxlen} if type(value) is deque else {})}
    if type(value) is dict and all(isinstance(key, PLAIN) for key in value):
        pairs = enumerate(value.items())
        return {"dict": [[key, take_apart(f"{name}[{index}]", item, store)] for index, (key, item) in pairs]}
    if type(value) is set and all(isinstance(item, PLAIN) for item in value):
        return {"set": sorted(value, key=repr)}
    return store(name, value)


def text_of(description: Any) -> str:
    """What is stored under the name of a container, or of a tensor whose shape is taken for another."""
    return _BEGINNING + json.dumps(description)


def put_together(
    state: Mapping[str, Any], make: Callable[[Any, tuple[int, ...] | None], Any], where: str
) -> dict[str, Any]:
    """The states of one parameter, containers and all, out of what is stored of them.

    Args:
        state: leaves and texts, by their names.
        make: makes of a leaf what the caller wants of it, in its own shape or the given one; raises ValueError where it
            doesn't have so many elements.
        where: it is stored, for the message.

    Raises:
        CorruptCheckpointError: a text isn't one of `text_of`'s.
    """
    texts = {name for name, value in state.items() if isinstance(value, str) and value.startswith(_BEGINNING)}
    used: set[str] = set()

    def leaf(name: str, shape: tuple[int, ...] | None = None) -> Any:
        if name in texts:
            raise ValueError(f"{name!r} is in itself")
        used.add(name)
        return make(state[name], shape)

    def build(description: Any) -> Any:
        if isinstance(description, str):
            return leaf(description)
        if "tensor" in description:
            return leaf(description["tensor"], tuple(map(int, description["shape"])))
        if "dict" in description:
            return {key: build(item) for key, item in description["dict"]}
        if "set" in description:
            return {*description["set"]}
        if "deque" in description:
            return deque(map(build, description["deque"]), description["maxlen"])
        return [*map(build, description["list"])] if "list" in description else (*map(build, description["tuple"]),)

    built: dict[str, Any] = {}
    for name in texts:
        try:
            built[name] = build(json.loads(state[name].removeprefix(_BEGINNING)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptCheckpointError(f"{where}: {name!r} can't be put together: {error!r:.100}") from error
    whole = {
        name: built[name] if name in texts else make(value, None) for name, value in state.items() if name not in used
    }
    keyed = whole.pop(KEYED, {})
    return {**keyed, **whole} if isinstance(keyed, dict) else whole


def leaves_of(value: Any) -> Iterator[Any]:
    """What is in a container, and in those in it; or the value itself, where it is none."""
    if isinstance(value, (list, tuple, deque, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves_of(item)
    else:
        yield value
