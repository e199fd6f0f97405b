"""Tensors on their way into an export: read by one thread while another writes what was read before.

Peak memory is a ring of a few buffers, whatever the tensors' sizes. Both threads spend their time in calls that let go
of the interpreter's lock (`pread`, a cast, a checksum, `pwrite`), so they do run side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_zero.checkpoint.tensors import LazyTensor, tensor_bytes

CHUNK_BYTES = 4 << 20
_BUFFERS = 3
"""One is being written, one is full, one is being filled."""

Look = Callable[[int, memoryview], object]


class Overflows:
    """The tensors of which a finite value became infinite in a narrower dtype."""

    def __init__(self) -> None:
        self._found: dict[int, LazyTensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def look(self, tensor: LazyTensor, start: int, stop: int, read: Tensor) -> None:
        """See whether `read`, the elements `[start, stop)` of a tensor, has lost one."""
        stored, shown = tensor.stored_dtype, read.dtype
        if tensor in self or stored == shown or not (stored.is_floating_point and shown.is_floating_point):
            return
        if torch.finfo(stored).max <= torch.finfo(shown).max or all(map(torch.isfinite, torch.aminmax(read))):
            return
        if (infinite := read.isinf()).any():
            before = torch.empty(stop - start, dtype=stored)
            tensor.shown_in(stored).read_range(start, stop, before)
            if (infinite & before.isfinite()).any():
                self._found[id(tensor)] = tensor


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
    buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_BUFFERS)]

    def read(turn: int, number: int, start: int, stop: int) -> tuple[int, memoryview]:
        tensor = tensors[number]
        if isinstance(tensor, LazyTensor):
            nbytes = (stop - start) * tensor.dtype.itemsize
            if len(buffers[turn]) < nbytes:
                buffers[turn] = torch.empty(nbytes, dtype=torch.uint8)
            part = buffers[turn][:nbytes].view(tensor.dtype)
            tensor.read_range(start, stop, part)
            if overflows is not None:
                overflows.look(tensor, start, stop, part)
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


def _ranges(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int, int]]:
    for number, tensor in enumerate(tensors):
        numel, step = tensor.numel(), max(1, CHUNK_BYTES // tensor.dtype.itemsize)
        yield from ((number, start, min(start + step, numel)) for start in range(0, numel, step))
