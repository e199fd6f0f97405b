"""Large tensors elsewhere in Lightning's dict, such as the weights beside a callback's averages.

They go into rank 0's shard, as fast as all other tensors and behind training where the rest goes there; in `trainer.pt`
a placeholder stands for each: a dict with the one key `lightning_zero_tensor`, and the name of an entry whose role is
`elsewhere`. Whoever loads or exports the checkpoint gets the tensor back where it was.

Both ways walk through dicts, lists and tuples alone, and no deeper than a few levels; what is there twice is walked
through once, and two places that hold one tensor hold one again.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from lightning_zero.checkpoint.pickled import Ordered
from lightning_zero.errors import CorruptCheckpointError, UnsupportedModelError

_PLACEHOLDER = "lightning_zero_tensor"
_CONTAINERS = (dict, OrderedDict, Ordered, list, tuple)
_DEEPEST = 8
_LONGEST_NAME = 200
_T = TypeVar("_T")


def take_out(
    content: Mapping[str, Any], is_taken: Callable[[Any], bool], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put placeholders in the place of some tensors.

    Args:
        content: Lightning's dict; it isn't changed.
        is_taken: whether something in it is such a tensor.
        names: that are given away already.

    Returns:
        The same with placeholders, and the tensors by the names that these hold.

    Raises:
        UnsupportedModelError: it has what looks like a placeholder.
    """
    taken: dict[str, Any] = {}
    by_identity: dict[int, str] = {}

    def replace(value: Any, path: tuple[Any, ...]) -> Any:
        if type(value) is dict and value.keys() == {_PLACEHOLDER}:
            raise UnsupportedModelError(
                f"a dict with the one key {_PLACEHOLDER!r} can't be saved: it is a name of our own"
            )
        if not is_taken(value):
            return value
        if id(value) not in by_identity:
            name = f"<{'.'.join(map(str, path)):.{_LONGEST_NAME}}>"
            while name in names or name in taken:
                name += "'"
            by_identity[id(value)], taken[name] = name, value
        return {_PLACEHOLDER: by_identity[id(value)]}

    return _replaced(dict(content), replace, (), {}), taken


def put_back(
    content: dict[Any, Any], tensors: Mapping[str, _T], give: Callable[[_T], Any], where: str
) -> dict[Any, Any]:
    """Put what placeholders stand for in their place.

    Args:
        content: of `trainer.pt`, as an object or in the terms of `pickled`.
        tensors: that are in the shards, by name.
        give: makes of one what is put there; asked once for each.
        where: the content is from, for the message.

    Raises:
        CorruptCheckpointError: a placeholder stands for nothing.
    """
    given: dict[str, Any] = {}

    def replace(value: Any, _: tuple[Any, ...]) -> Any:
        if type(value) is not dict or value.keys() != {_PLACEHOLDER}:
            return value
        name = value[_PLACEHOLDER]
        if not isinstance(name, str) or name not in tensors:
            raise CorruptCheckpointError(f"{where} has a tensor {name!r:.100} in another file, and there is none")
        if name not in given:
            given[name] = give(tensors[name])
        return given[name]

    found: dict[Any, Any] = _replaced(content, replace, (), {})
    return found


def _replaced(
    value: Any, replace: Callable[[Any, tuple[Any, ...]], Any], path: tuple[Any, ...], known: dict[int, Any]
) -> Any:
    """The same value, or a copy of it in which something is replaced."""
    instead = replace(value, path)
    if instead is not value or type(value) not in _CONTAINERS:
        return instead
    if id(value) in known or len(path) == _DEEPEST:
        return known.get(id(value), value)
    known[id(value)] = value  # should it hold itself
    items = value.items() if isinstance(value, dict) else enumerate(value)
    new = {key: found for key, item in items if (found := _replaced(item, replace, (*path, key), known)) is not item}
    if new and isinstance(value, tuple):
        known[id(value)] = tuple(new.get(index, item) for index, item in enumerate(value))
    elif new:
        known[id(value)] = changed = copy.copy(value)
        for key, found in new.items():
            changed[key] = found
    return known[id(value)]
