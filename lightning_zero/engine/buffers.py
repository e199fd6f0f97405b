"""A few flat buffers, used again and again: memory that is touched for the first time is five times as slow."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """Lends flat buffers. What is lent is uninitialised, and must be given back by whoever took it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A 1-D tensor of `numel` elements."""
        fitting = [
            buffer
            for buffer in self._free
            if buffer.dtype == dtype and buffer.device == device and buffer.numel() >= numel
        ]
        if fitting:
            whole = min(fitting, key=Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not whole]
        else:
            # Those that are too small would never be taken again by the larger ones to come: let them go.
            self._free = [buffer for buffer in self._free if buffer.dtype != dtype or buffer.device != device]
            whole = torch.empty(numel, dtype=dtype, device=device)
        lent = whole[:numel]
        self._lent[id(lent)] = (lent, whole)
        return lent

    def give_back(self, lent: Tensor) -> None:
        """Take a buffer back. A tensor that isn't of this pool is none of its business."""
        _, whole = self._lent.pop(id(lent), (lent, None))
        if whole is not None:
            self._free.append(whole)

    @property
    def nbytes(self) -> int:
        """Of all buffers, lent or not."""
        return sum(buffer.nbytes for buffer in (*self._free, *(whole for _, whole in self._lent.values())))

    def clear(self) -> None:
        """Let go of everything that isn't lent."""
        self._free.clear()
