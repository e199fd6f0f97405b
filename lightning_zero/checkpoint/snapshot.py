"""What one rank puts into a checkpoint, as it was at one moment: a copy in host memory that is used again and again.

On the CPU the copy is there when `take` returns. On CUDA it is under way then, into pinned memory, and on a stream of
its own beside the next forward and backward: `fence` has the device wait for it before the optimizer changes what is
being copied, and `wait` the thread that writes it. What a forward may change is copied on the device's current stream.

Memory that is touched for the first time costs five times as much as the copy itself, so the block is kept; and it is
touched ahead of time, by a thread of its own (`reserve`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_zero.checkpoint.content import RankContent, TensorToSave
from lightning_zero.checkpoint.shards import place_in_file
from lightning_zero.checkpoint.storage import DIRECT_ALIGNMENT
from lightning_zero.memory import prefault
from lightning_zero.threads import start_thread


class Snapshot:
    """One rank's copy. A second one is taken into the same memory: the first has to be done with by then."""

    def __init__(self) -> None:
        self._memory = _nothing()
        self._places: dict[tuple[int, torch.dtype, torch.Size], Tensor] = {}
        """Those of the last copy: making hundreds of tensors takes a millisecond, for which training would wait."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []
        self._reserving: threading.Thread | None = None

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Get the memory for a snapshot of so many bytes, without making anybody wait."""

        def get() -> None:
            self._let_go()
            with suppress(RuntimeError):  # there is too little: `take` tries again, and says so
                self._memory = _allocate(nbytes, pinned=pinned)

        if self._reserving is None and len(self._memory) < nbytes:
            self._reserving = start_thread(get, "lightning_zero-reserve")  # if there can be none, `take` gets it

    def _reserved(self) -> None:
        reserving, self._reserving = self._reserving, None
        if reserving is not None:
            reserving.join()

    def take(self, content: RankContent) -> RankContent:
        """Copy every tensor, and give the same content with the copies."""
        self._reserved()
        items = [*content.tensors, *content.unchanging]
        offsets, end = _lay_out(content)
        devices = {item.tensor.device for item in items if item.tensor.is_cuda}
        if len(self._memory) < end + DIRECT_ALIGNMENT:
            self._let_go()  # of the smaller block first
            self._memory = _allocate(end + DIRECT_ALIGNMENT, pinned=bool(devices))
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        begin = -self._memory.data_ptr() % DIRECT_ALIGNMENT
        wheres = [
            (begin + offset, item.tensor.dtype, item.tensor.shape) for item, offset in zip(items, offsets, strict=True)
        ]
        self._places = {where: self._places[where] if where in self._places else self._at(*where) for where in wheres}
        copies = [item._replace(tensor=self._places[where]) for item, where in zip(items, wheres, strict=True)]
        self._copy(items, copies)
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        trained = len(content.tensors)
        return replace(content, tensors=copies[:trained], unchanging=copies[trained:])

    def _at(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return self._memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    @torch.no_grad()
    def _copy(self, items: Sequence[TensorToSave], copies: Sequence[TensorToSave]) -> None:
        at_once: tuple[list[Tensor], list[Tensor]] = [], []
        for item, copy in zip(items, copies, strict=True):
            if item.tensor.is_cuda and item.steady:
                with torch.cuda.stream(self._streams[item.tensor.device]):
                    copy.tensor.copy_(item.tensor, non_blocking=True)
                item.tensor.record_stream(self._streams[item.tensor.device])
            else:
                at_once[0].append(copy.tensor)
                at_once[1].append(item.tensor)
        if at_once[0]:
            torch._foreach_copy_(*at_once, non_blocking=True)

    def fence(self) -> None:
        """Before the device changes what is being copied: have it wait for the copy, and not the host."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def wait(self) -> None:
        """Before the copy is read: wait until it is there."""
        for event in self._events:
            event.synchronize()
        for stream in self._streams.values():
            stream.synchronize()

    def release(self) -> None:
        """Give the memory back."""
        self._reserved()
        self._let_go()

    def _let_go(self) -> None:
        self.wait()  # nobody has, for a copy that came to nothing: what it is in may still be written
        self._events = []
        if self._memory.is_pinned():
            torch.cuda.check_error(_cuda_runtime().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = _nothing()
        self._places.clear()


def _lay_out(content: RankContent) -> tuple[list[int], int]:
    """Where each tensor goes, and where the last one ends: packed as in the file, which so is written without a copy.

    Trained and untrained parameters have a file of their own, which begins with a page. Nothing is wrong where the
    order isn't the file's: what isn't aligned as it is there is copied once more, on its way to the disk.
    """
    offsets, end = [], 0
    for of_file in (content.tensors, content.unchanging):
        end += -end % DIRECT_ALIGNMENT
        begins: dict[int, int] = {}
        sizes = [(item.tensor.element_size(), item.tensor.nbytes) for item in of_file]
        for index in sorted(range(len(of_file)), key=lambda index: place_in_file(*sizes[index])):
            begins[index] = end
            end += sizes[index][1]
        offsets += [begins[index] for index in range(len(of_file))]
    return offsets, end


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _allocate(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory of just this size: torch's own allocator pins up to twice as much, a power of two, and keeps it.

    Source: https://github.com/pytorch/pytorch/issues/95823.
    """
    memory = prefault(torch.empty(nbytes, dtype=torch.uint8))
    if pinned:
        portable = 1  # pinned for every device: cudaHostRegisterPortable
        torch.cuda.check_error(_cuda_runtime().cudaHostRegister(memory.data_ptr(), nbytes, portable))
    return memory


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
