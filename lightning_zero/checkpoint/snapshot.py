"""What one rank puts into a checkpoint, as it was at one moment: a copy in host memory that is used again and again.

On the CPU the copy is there when `take` returns. On CUDA it is under way then, into pinned memory, and on a stream of
its own beside the next forward and backward: `fence` has the device wait for it before the optimizer changes what is
being copied, and `wait` the thread that writes it. What a forward may change is copied on the device's current stream.

Memory that is touched for the first time costs five times as much as the copy itself, so the block is kept; the first
time it comes in huge pages where the system has them.
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import torch
from torch import Tensor

from lightning_zero.checkpoint.content import RankContent, TensorToSave

_ALIGNMENT = 64


class Snapshot:
    """One rank's copy. A second one is taken into the same memory: the first has to be done with by then."""

    def __init__(self) -> None:
        self._memory = _nothing()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []

    def take(self, content: RankContent) -> RankContent:
        """Copy every tensor, and give the same content with the copies."""
        items = [*content.tensors, *content.unchanging]
        offsets, end = [], 0
        for item in items:
            offsets.append(end)
            end += item.tensor.nbytes
            end += -end % _ALIGNMENT
        devices = {item.tensor.device for item in items if item.tensor.is_cuda}
        if len(self._memory) < end:
            self._memory = _nothing()  # let go of the smaller block first
            self._memory = _allocate(end, pinned=bool(devices))
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        copies = [self._copy(item, offset) for item, offset in zip(items, offsets, strict=True)]
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        trained = len(content.tensors)
        return replace(content, tensors=copies[:trained], unchanging=copies[trained:])

    def _copy(self, item: TensorToSave, offset: int) -> TensorToSave:
        source = item.tensor.detach()
        copy = self._memory[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
        if source.is_cuda and item.steady:
            with torch.cuda.stream(self._streams[source.device]):
                copy.copy_(source, non_blocking=True)
            source.record_stream(self._streams[source.device])
        else:
            copy.copy_(source, non_blocking=True)
        return replace(item, tensor=copy)

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
        self._memory = _nothing()


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _allocate(nbytes: int, *, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    block = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)
