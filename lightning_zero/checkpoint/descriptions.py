"""What stands in a description (`pickled`), looked at before it is believed.

Another thing than what belongs in a place is an error that names the file, whoever made the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES, LARGEST
from lightning_zero.checkpoint.pickled import Global, Object
from lightning_zero.errors import CorruptCheckpointError

_T = TypeVar("_T")

_MOST_DIMENSIONS = 64
_FORMATS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
"""In which a step is kept."""


def require(value: object, kind: type[_T], what: str) -> _T:
    """The same value, if it is of that kind; an `int` isn't negative, nor more than 64 bits have.

    Raises:
        CorruptCheckpointError: it is something else.
    """
    if not isinstance(value, kind) or (kind is int and not _is_count(value)):
        raise CorruptCheckpointError(f"{what} is {type(value).__name__}, which doesn't belong there")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def item(of: Mapping[Any, Any], key: str, kind: type[_T], where: str) -> _T:
    """What stands under a key, if it is of that kind; see `require`."""
    return require(of.get(key), kind, f"{where}: {key!r}")


def integers(value: object, what: str) -> tuple[int, ...]:
    """A list of sizes, numbers or the like.

    Raises:
        CorruptCheckpointError: it is something else.
    """
    if not isinstance(value, list | tuple) or not all(map(_is_count, value)):
        raise CorruptCheckpointError(f"{what} is no list of whole numbers")
    return tuple(value)


def sizes(value: object, what: str) -> tuple[int, ...]:
    """A shape, or a place in one: a list, or a `torch.Size`.

    Raises:
        CorruptCheckpointError: it is something else.
    """
    if type(value) is Object and value.function == Global("torch", "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
    found = integers(value, what)
    if len(found) > _MOST_DIMENSIONS:
        raise CorruptCheckpointError(f"{what} has {len(found)} dimensions")
    return found


def number_of_steps(value: object, what: str) -> float:
    """A step that an optimizer has come to, as a number or as a tensor with one.

    Raises:
        CorruptCheckpointError: it is something else.
    """
    if isinstance(value, Elements):
        if value.numel != 1 or value.stored not in _FORMATS:
            raise CorruptCheckpointError(f"{what} is a tensor of {value.numel} elements in {value.stored}")
        content = bytearray(ITEM_BYTES[value.stored])
        value.source.read(0, 1, memoryview(content))
        value = struct.unpack(_FORMATS[value.stored], content)[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise CorruptCheckpointError(f"{what} is {type(value).__name__}, and no number of steps")
    return float(value)
