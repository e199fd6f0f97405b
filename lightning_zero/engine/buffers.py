"""Memory that is used again, or got ready: what is touched for the first time is five times as slow."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lightning_zero.memory import prefault
from lightning_zero.threads import start_thread


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


class StateMemory:
    """Memory on the host for optimizer states that are going to be loaded: as much of it as can be had is warm by then.

    Parameters leave some when they move into a flat buffer. The rest is asked for at once, and touched by a thread of
    its own, while the ranks build what they need to train.
    """

    _ALIGNMENT = 64
    _BYTES_PER_STATE = 4  # of one state's element, as a rule
    _MOST_STATES = 16  # of a parameter, whatever a checkpoint says
    _MOST_FOR_ONE = 2
    """A state may keep a block of so many times its size: it stays for as long as the state does."""

    def __init__(self) -> None:
        self._wanted: Counter[int] = Counter()
        """By their bytes: how many of the blocks that parameters leave are still to be kept."""
        self._touching: list[tuple[threading.Thread, list[Tensor]]] = []
        self._blocks: list[Tensor] = []
        self._sizes: list[int] = []
        """Of the blocks, ascending."""

    def expect(self, owned: Sequence[tuple[int, int]], leaving: Sequence[int]) -> None:
        """Get ready for the states of more parameters, which will leave their memory after this.

        Args:
            owned: how many elements of each are this rank's, and how many bytes their states have.
            leaving: the bytes that each of them will leave.
        """
        states: list[int] = []
        for numel, nbytes in owned:
            nbytes_of_one = numel * self._BYTES_PER_STATE
            count = round(nbytes / nbytes_of_one)  # AdamW has a step of 4 bytes beside them
            states += [nbytes_of_one] * min(count, self._MOST_STATES)
        # As `empty` will find room for them, the largest first
        blocks, rests, missing = sorted(leaving), list[int](), 0
        for nbytes in sorted(states, reverse=True):
            block, rest = bisect_left(blocks, nbytes), bisect_left(rests, nbytes)
            if rest < len(rests):
                insort(rests, rests.pop(rest) - self._taken_by(nbytes))
            elif block < len(blocks) and blocks[block] <= self._MOST_FOR_ONE * nbytes:
                self._wanted[blocks[block]] += 1
                insort(rests, blocks.pop(block) - self._taken_by(nbytes))
            else:
                missing += self._taken_by(nbytes)
        if missing:
            self._touch(missing)

    def _taken_by(self, nbytes: int) -> int:
        """How much of a block a state takes: what is left begins aligned."""
        return nbytes + -nbytes % self._ALIGNMENT

    def _touch(self, nbytes: int) -> None:
        touched: list[Tensor] = []

        def touch() -> None:
            with suppress(RuntimeError):  # there is too little: whoever needs it will be told
                touched.append(prefault(torch.empty(nbytes, dtype=torch.uint8)))

        thread = start_thread(touch, "lightning_zero-touch")
        if thread is not None:  # else the memory will be cold
            self._touching.append((thread, touched))

    def _take_touched(self) -> None:
        for thread, touched in self._touching:
            thread.join()
            for block in touched:
                self._insert(block)
        self._touching.clear()

    def keep(self, left: Tensor) -> None:
        """Take over the memory of a tensor that nobody needs any more, if nobody else can see it."""
        storage = left.untyped_storage()
        seen = not is_unshared(left) or not storage.resizable() or storage.is_shared()  # NumPy's, a file's
        if self._wanted[storage.nbytes()] and left.is_cpu and not seen:
            self._wanted[storage.nbytes()] -= 1
            self._insert(torch.empty(0, dtype=torch.uint8).set_(storage))

    def _insert(self, block: Tensor) -> None:
        place = bisect_left(self._sizes, block.nbytes)
        self._sizes.insert(place, block.nbytes)
        self._blocks.insert(place, block)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor: in what was got ready, where there is room for it in one piece."""
        self._take_touched()
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        tightest = bisect_left(self._sizes, nbytes)
        if tightest == len(self._sizes) or not nbytes or device.type != "cpu":
            return prefault(torch.empty(shape, dtype=dtype, device=device))
        del self._sizes[tightest]
        block = self._blocks.pop(tightest)
        self._insert(block[self._taken_by(nbytes) :])
        # Not a view: whoever copies, pickles or sends one would take the whole block
        return torch.frombuffer(block.numpy(), dtype=dtype, count=nbytes // dtype.itemsize).view(shape)

    def release(self) -> None:
        """Let go of what hasn't been used, and keep nothing any more."""
        self._take_touched()
        self._wanted.clear()
        self._blocks.clear()
        self._sizes.clear()


def is_unshared(tensor: Tensor) -> bool:
    """Whether no other tensor holds a dense tensor's memory, so far as torch knows.

    Torch 2.6's autograd goes on holding a gradient's while its hooks run: there, none is unshared.
    """
    uses = getattr(torch._C, "_storage_Use_Count", None)
    if uses is None or tensor.is_sparse:
        return False
    # One is the tensor's own, one the handle's that asks (which has to be there still, or torch 2.6 doesn't count it)
    storage = tensor.untyped_storage()
    return bool(uses(storage._cdata) <= 2)
