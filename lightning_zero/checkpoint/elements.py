"""A tensor that is still in a checkpoint, without torch: its shape, its dtypes, and how its bytes are come by.

It has two dtypes, both by safetensors' codes: the one in which its elements are stored, and the one in which it is
shown to whoever reads it. Reading gives the elements as they are stored; whoever wants others casts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from lightning_zero.checkpoint.manifest import DTYPES, ITEM_BYTES

NAMES: Mapping[str, str] = {code: name for name, (code, _) in DTYPES.items()}
"""torch's name of each dtype, by its code."""

FLOATING = frozenset(code for code, name in NAMES.items() if "float" in name)


class Source(Protocol):
    """Where the flattened elements of one stored tensor are read."""

    def require(self) -> None:
        """Raise what `read` would, if it can be told before there is memory for the elements."""
        ...

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with the elements `[start, stop)`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """One unread tensor; tied tensors are one object.

    Attributes:
        source: where it is read.
        shape: of the tensor.
        stored: the code of the dtype that the elements have in the source.
        shown: the code of the tensor's own dtype.
        worth_reading: read at least so many bytes at once, where each request takes long; 0 elsewhere.
    """

    source: Source
    shape: tuple[int, ...]
    stored: str
    shown: str
    worth_reading: int = 0

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor, as it is shown."""
        return self.numel * ITEM_BYTES[self.shown]

    def shown_in(self, code: str) -> Elements:
        """The same elements, unread, as a tensor of another dtype."""
        return replace(self, shown=code)
