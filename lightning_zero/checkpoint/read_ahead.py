"""Tensors on their way into an export: read by one thread while another writes what was read before.

Peak memory is a ring of a few buffers, whatever the tensors' sizes. Both threads spend their time in calls that let go
of the interpreter's lock (`pread`, a cast, a checksum, `pwrite`), so they do run side by side. torch is imported where
a tensor is shown in another dtype than it is stored in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES

CHUNK_BYTES = 4 << 20
_BUFFERS = 3
"""One is being written, one is full, one is being filled."""

Look = Callable[[int, memoryview], object]


def read_ahead(
    contents: Sequence[Elements | memoryview], look: Look | None = None, overflows: set[Elements] | None = None
) -> Iterator[tuple[int, memoryview]]:
    """The bytes of each in turn, in chunks that are each gone when the next is asked for; of nothing, an empty one.

    Args:
        contents: unread tensors, or bytes as they are.
        look: called with each chunk and the number of what it is of, in order, by the thread that reads.
        overflows: where to note the tensors of which a finite value became infinite in a narrower dtype.

    Yields:
        The number of what is read, and a chunk of its bytes.
    """
    buffers, stored_buffer = _Buffers(_BUFFERS), _Buffers(1)
    if any(isinstance(content, Elements) and content.shown != content.stored for content in contents):
        from lightning_zero.checkpoint.cast import cast

    def fill(elements: Elements, turn: int, start: int, stop: int) -> memoryview:
        chunk = buffers.take(turn, (stop - start) * ITEM_BYTES[elements.shown])
        if elements.shown == elements.stored:
            elements.source.read(start, stop, chunk)
        elif chunk:
            stored = stored_buffer.take(0, (stop - start) * ITEM_BYTES[elements.stored])
            elements.source.read(start, stop, stored)
            if cast(stored, elements.stored, chunk, elements.shown) and overflows is not None:
                overflows.add(elements)
        return chunk

    def read(turn: int, number: int, start: int, stop: int) -> tuple[int, memoryview]:
        content = contents[number]
        chunk = fill(content, turn, start, stop) if isinstance(content, Elements) else content[start:stop]
        if look is not None:
            look(number, chunk)
        return number, chunk

    under_way: deque[Future[tuple[int, memoryview]]] = deque()
    with ThreadPoolExecutor(1, "lightning_zero-read-ahead") as reader:
        try:
            for turn, (number, start, stop) in enumerate(_ranges(contents)):
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
        self._memory = [memoryview(bytearray()) for _ in range(count)]

    def take(self, turn: int, nbytes: int) -> memoryview:
        if len(self._memory[turn]) < nbytes:
            self._memory[turn] = memoryview(bytearray(nbytes))
        return self._memory[turn][:nbytes]


def _ranges(contents: Iterable[Elements | memoryview]) -> Iterator[tuple[int, int, int]]:
    for number, content in enumerate(contents):
        if isinstance(content, Elements):
            numel = content.numel
            step = max(1, max(CHUNK_BYTES, content.worth_reading) // ITEM_BYTES[content.shown])
        else:
            numel, step = len(content), CHUNK_BYTES
        yield from ((number, start, min(start + step, numel)) for start in range(0, max(1, numel), step))
