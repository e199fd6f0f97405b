"""The dict that was flattened to leaves: what is below one of its keys, and it itself again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_zero.checkpoint.fsdp.metadata import KeyPath
from lightning_zero.errors import CorruptCheckpointError

_T = TypeVar("_T")


def below(leaves: Mapping[KeyPath, _T], key: KeyPath) -> dict[KeyPath, _T]:
    """What stands below a key, by what is left of the paths."""
    return {path[len(key) :]: leaf for path, leaf in leaves.items() if is_below(path, key)}


def joined(path: KeyPath) -> str:
    """A path as one name."""
    return ".".join(map(str, path))


def is_below(path: KeyPath, key: KeyPath) -> bool:
    """Whether a path leads through a key."""
    return len(path) > len(key) and path[: len(key)] == key


class _Node(dict[Any, Any]):
    """A dict, or a list by its numbers: not what a leaf itself is."""


def nested(values: Mapping[KeyPath, object], where: str) -> Any:
    """The dict or the list that flattened to these.

    Raises:
        CorruptCheckpointError: a list has a hole, or a leaf has leaves.
    """
    root = _Node()
    for path, value in values.items():
        node: Any = root
        for key in path[:-1]:
            node = node.setdefault(key, _Node())
            if type(node) is not _Node:
                raise CorruptCheckpointError(f"{where}: something stands below {key!r:.80}, which holds no other")
        node[path[-1]] = value
    return _of_node(root, where)


def _of_node(value: object, where: str) -> Any:
    if type(value) is not _Node:
        return value
    made = {key: _of_node(inner, where) for key, inner in value.items()}
    if not any(type(key) is int for key in made):
        return made
    if made.keys() != set(range(len(made))):
        raise CorruptCheckpointError(f"{where}: a list lacks some of its items")
    return [made[number] for number in range(len(made))]
