"""Tensors on their way into an export: read by one thread while another writes what was read before.

Peak memory is a ring of a few buffers, whatever the tensors' sizes. Both threads spend their time in calls that let go
of the interpreter's lock (`pread`, a cast, a checksum, `pwrite`), so they do run side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from lightning_zero.checkpoint.tensors import LazyTensor, tensor_bytes

CHUNK_BYTES = 4 << 20
_BUFFERS = 3
"""One is being written, one is full, one is being filled."""

Look = Callable[[int, memoryview], object]


_ONE_THREADS_NUMEL = 24 << 10
"""What torch casts in the thread that asks for it. With more, it wakes a team of threads and waits for the
last of them: where others (a training, say) keep the processors busy, that takes ten times as long as the work."""


class Overflows:
    """The tensors of which a finite value became infinite in a narrower dtype."""

    def __init__(self) -> None:
        self._found: dict[int, LazyTensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def look(self, tensor: LazyTensor, before: Tensor, after: Tensor) -> None:
        """See whether a part of a tensor has lost a value when it was cast."""
        if tensor in self or not (before.is_floating_point() and after.is_floating_point()):
            return
        if torch.finfo(before.dtype).max <= torch.finfo(after.dtype).max or _all_finite(after):
            return
        if (after.isinf() & before.isfinite()).any():
            self._found[id(tensor)] = tensor


def _cast(source: Tensor, target: Tensor) -> None:
    sources, targets = torch.split(source, _ONE_THREADS_NUMEL), torch.split(target, _ONE_THREADS_NUMEL)
    for part, narrow in zip(sources, targets, strict=True):
        narrow.copy_(part)


def _all_finite(tensor: Tensor) -> bool:
    """By the bits: without its sign, an infinite value or a NaN is a larger integer than any other."""
    integer = {2: np.uint16, 4: np.uint32}[tensor.dtype.itemsize]
    bits = np.frombuffer(tensor_bytes(tensor), integer)
    infinite = np.frombuffer(tensor_bytes(torch.tensor([torch.inf], dtype=tensor.dtype)), integer)[0]
    parts = (bits[begin : begin + _ONE_THREADS_NUMEL] for begin in range(0, len(bits), _ONE_THREADS_NUMEL))
    return all((part << 1).max() < infinite << 1 for part in parts)


def read_ahead(
    tensors: Sequence[Tensor], look: Look | None = None, overflows: Overflows | None = None
) -> Iterator[tuple[int, memoryview]]:
    """The bytes of each tensor in turn, in chunks that are each gone when the next is asked for.

    Args:
        tensors: contiguous ones on the CPU, or unread.
        look: called with each chunk and its tensor's number, in order, by the thread that reads.
        overflows: where to note what became infinite.

    Yields:
        The number of the tensor, and a chunk of its bytes.
    """
    buffers, stored_buffer = _Buffers(_BUFFERS), _Buffers(1)

    def read(turn: int, number: int, start: int, stop: int) -> tuple[int, memoryview]:
        tensor = tensors[number]
        if isinstance(tensor, LazyTensor):
            part = buffers.take(turn, stop - start, tensor.dtype)
            if tensor.dtype == tensor.stored_dtype:
                tensor.read_range(start, stop, part)
            else:
                stored = stored_buffer.take(0, stop - start, tensor.stored_dtype)
                tensor.shown_in(tensor.stored_dtype).read_range(start, stop, stored)
                _cast(stored, part)
                if overflows is not None:
                    overflows.look(tensor, stored, part)
        else:
            part = tensor.detach().view(-1)[start:stop]
        chunk = tensor_bytes(part)
        if look is not None:
            look(number, chunk)
        return number, chunk

    under_way: deque[Future[tuple[int, memoryview]]] = deque()
    with ThreadPoolExecutor(1, "lightning_zero-read-ahead") as reader:
        try:
            for turn, (number, start, stop) in enumerate(_ranges(tensors)):
                if len(under_way) == _BUFFERS:
                    yield under_way.popleft().result()
                under_way.append(reader.submit(read, turn % _BUFFERS, number, start, stop))
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


class _Buffers:
    """Memory that is used again, by turns."""

    def __init__(self, count: int) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(count)]

    def take(self, turn: int, numel: int, dtype: torch.dtype) -> Tensor:
        nbytes = numel * dtype.itemsize
        if len(self._memory[turn]) < nbytes:
            self._memory[turn] = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[turn][:nbytes].view(dtype)


def _ranges(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int, int]]:
    for number, tensor in enumerate(tensors):
        numel, step = tensor.numel(), max(1, CHUNK_BYTES // tensor.dtype.itemsize)
        yield from ((number, start, min(start + step, numel)) for start in range(0, numel, step))
