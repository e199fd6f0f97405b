"""How tensors get from rank to rank on the CPU: by gloo's sockets, or on one host straight from memory to memory.

[Note: an exchange by reading]
Ranks of one host can read each other's memory: one copy, made by the kernel, where gloo's sockets take two, and a
thread at either end. A rank tells each peer where that lies which is meant for it; a thread of the peer's reads it from
there, and tells that it has. Both go over a Unix socket, a few bytes each. (MPI and UCX call it cross-memory attach.
Source: process_vm_readv(2).) What is to be summed is read and added a few megabytes at a time: the others' shards are
never held whole.

The thread is there lest ranks wait for each other, one in an exchange, another in a collective that comes later: an
exchange goes on whatever the rank itself does. What a rank tells comes in the order of the exchanges, and at most
`_UNREAD` of them are ahead of a peer, so that telling never blocks.

Where the system forbids it (other hosts, containers with processes of their own, Yama's ptrace_scope above 0), all
ranks agree on gloo.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import socket
import struct
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_zero.engine.buffers import BufferPool

_Pieces: TypeAlias = "tuple[Tensor, ...] | list[Tensor]"

_UNREAD = 64
"""How many exchanges a peer may be told of that it hasn't read yet: far fewer than the messages that a socket holds."""
_MESSAGE = struct.Struct("<Qq")
"""The number of an exchange, and where the tensor is; or, when that has been read, 0, and 1 if it couldn't be."""
_BLOCK_BYTES = 4 << 20
"""How much is read before it is added: a few megabytes are still in the processor's cache then. It isn't less, since
the thread needs Python's lock a few times a block, and a rank that computes in Python lets go of it every 5 ms only."""
_GRAIN = 32768
"""How many elements one call adds: no more than torch leaves to one thread, so that the reading thread starts none."""
_SECRET_BYTES = 16
_PURPOSES = (0, 1)
"""Of a connection: for what is told before it is read, and after."""
_HELLO = struct.Struct(f"<{_SECRET_BYTES}sII")
"""The secret of whoever listens, which rank calls, and for which purpose."""


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the result stands (on CUDA: when the current stream is made to wait for it)."""


class Works(Pending):
    """Works of torch's."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        self._works = works

    @override
    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()


class Then(Pending):
    """An operation, and what is left to be done with its result when it is waited for."""

    def __init__(self, pending: Pending, do: Callable[[], object]) -> None:
        self._pending, self._do = pending, do

    @override
    def wait(self) -> None:
        self._pending.wait()
        self._do()


class Transport(Protocol):
    """Point-to-point messages among the ranks of a group."""

    def exchange(self, received: Sequence[tuple[int, Tensor]], sent: Sequence[tuple[int, Tensor]]) -> Pending:
        """Begin to receive into tensors, and to send others; every rank calls it at the same place.

        Args:
            received: from whom, and a contiguous CPU tensor to fill.
            sent: to whom, and a contiguous CPU tensor, which nobody may change till `wait()` has returned.
        """

    def sum(self, own: Tensor, out: Tensor, sent: Sequence[tuple[int, Tensor]], *, accumulate: bool) -> Pending:
        """Begin to sum a tensor with one from every other rank, and to send others; every rank calls it there too.

        They are summed in the order of the ranks, so that the sum doesn't depend on whose it is.

        Args:
            own: this rank's addend, a contiguous CPU tensor, and scratch memory afterwards; where it is empty, nobody
                sends anything here.
            out: as long; the sum replaces it, or is added to it. Of any dtype.
            sent: as in `exchange`; every other rank that has an addend is sent one as long.
            accumulate: add the sum to `out`.
        """

    def release(self) -> None:
        """Let go of the group."""


def add_in_order(addends: Iterable[_Pieces], out: _Pieces, *, accumulate: bool) -> None:
    """Sum tensors from the first to the last into another, or onto what is in there; the first may be changed.

    Args:
        addends: each in as many pieces as `out`, and asked for when its turn has come.
        out: of any dtype.
        accumulate: add to what is in there.
    """
    move = torch._foreach_add_ if accumulate else torch._foreach_copy_
    in_turn = iter(addends)
    first = next(in_turn)
    # In one dtype the sum of this backward first, and then onto what is there: as DDP adds an averaged gradient
    total = first if first[0].dtype == out[0].dtype else out
    if total is out:
        move(out, first)
    for addend in in_turn:
        torch._foreach_add_(total, addend)
    if total is first:
        move(out, first)


def transport_for(group: dist.ProcessGroup, timeout: timedelta) -> Transport:
    """The fastest one that there is between all ranks of a group of gloo. A collective.

    Args:
        group: of ranks.
        timeout: how long a rank waits for another.
    """
    return _connect(group, timeout) or Sockets(group)


class Sockets(Transport):
    """Gloo's own messages."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._peers = dist.get_process_group_ranks(group)
        self._received = BufferPool()

    @override
    def exchange(self, received: Sequence[tuple[int, Tensor]], sent: Sequence[tuple[int, Tensor]]) -> Pending:
        works = [dist.irecv(tensor, src=self._peers[rank], group=self._group) for rank, tensor in received]
        works += [dist.isend(tensor, dst=self._peers[rank], group=self._group) for rank, tensor in sent]
        return Works(works)

    @override
    def sum(self, own: Tensor, out: Tensor, sent: Sequence[tuple[int, Tensor]], *, accumulate: bool) -> Pending:
        if not own.numel():
            return self.exchange([], sent)
        buffer = self._received.take(own.numel() * (len(self._peers) - 1), own.dtype, own.device)
        others = torch.split(buffer, own.numel())
        addends = [*others[: self._rank], own, *others[self._rank :]]
        received = [(rank, addend) for rank, addend in enumerate(addends) if rank != self._rank]

        def add() -> None:
            add_in_order([[addend] for addend in addends], [out], accumulate=accumulate)
            self._received.give_back(buffer)

        return Then(self.exchange(received, sent), add)

    @override
    def release(self) -> None:
        del self._group


class MemoryReads(Transport):
    """See [Note: an exchange by reading].

    Args:
        rank: this one's number.
        peers: each other rank, ascending.
    """

    def __init__(self, rank: int, peers: Mapping[int, _Peer]) -> None:
        self._rank = rank
        self._peers = peers
        self._scratch = torch.empty(2, _BLOCK_BYTES, dtype=torch.uint8)  # the thread's, which does one after the other
        self._exchanges = 0
        self._begun: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._begun.put, None)  # nobody may come to release it
        self._end.atexit = False

    @override
    def exchange(self, received: Sequence[tuple[int, Tensor]], sent: Sequence[tuple[int, Tensor]]) -> Pending:
        reads = [(self._peers[rank], tensor) for rank, tensor in received]
        return self._begin(partial(_fill, reads) if reads else None, [peer for peer, _ in reads], sent)

    @override
    def sum(self, own: Tensor, out: Tensor, sent: Sequence[tuple[int, Tensor]], *, accumulate: bool) -> Pending:
        if not own.numel():
            return self._begin(None, [], sent)
        peers = list(self._peers.values())
        read = partial(_sum, peers, self._rank, self._scratch.view(own.dtype), own, out, accumulate)
        return self._begin(read, peers, sent)

    def _begin(
        self, read: Callable[[int], None] | None, sources: Sequence[_Peer], sent: Sequence[tuple[int, Tensor]]
    ) -> Pending:
        self._exchanges += 1
        told = [(self._peers[rank], tensor) for rank, tensor in sent]
        reading = _Reading(self._exchanges, told, reads=read is not None)
        if read is not None:
            if self._thread is None:
                # It knows the queue alone: all else goes when its last owner lets go of it
                self._thread = threading.Thread(
                    target=_read_in_turn, args=(self._begun,), name="lightning_zero-reads", daemon=True
                )
                self._thread.start()
            self._begun.put(partial(reading.run, read, sources))
        return reading

    @override
    def release(self) -> None:
        peers = self._peers.values()
        del self._peers
        for peer in peers:
            peer.leave()
        self._end()
        if self._thread is not None:
            self._thread.join()  # lest a connection is closed, and its number another file's, while it reads there
        for peer in peers:
            peer.close()


@torch.no_grad()  # a gradient that is to be differentiated again has a graph
def _read_in_turn(begun: SimpleQueue[Callable[[], None] | None]) -> None:
    while (read := begun.get()) is not None:
        read()
        del read  # or its tensors would live until the next exchange


def _fill(reads: Sequence[tuple[_Peer, Tensor]], number: int) -> None:
    """Read a tensor from each peer of an exchange."""
    for peer, tensor in reads:
        peer.read(peer.is_told_where(number), tensor)


def _sum(
    peers: Sequence[_Peer], rank: int, scratch: Tensor, own: Tensor, out: Tensor, accumulate: bool, number: int
) -> None:
    """Read from all peers of an exchange what is added to a tensor in the order of the ranks."""
    where = [peer.is_told_where(number) for peer in peers]
    length = scratch.shape[1]

    def addends(offset: int, mine: Tensor) -> Iterator[_Pieces]:
        for turn in range(len(peers) + 1):
            if turn == rank:
                yield torch.split(mine, _GRAIN)
                continue
            index = turn - (turn > rank)
            into = scratch[min(turn, 1), : mine.numel()]  # the first stays till all are added
            peers[index].read(where[index] + offset * own.itemsize, into)
            yield torch.split(into, _GRAIN)

    for offset in range(0, own.numel(), length):
        block = slice(offset, offset + length)
        add_in_order(addends(offset, own[block]), torch.split(out[block], _GRAIN), accumulate=accumulate)


class _Reading(Pending):
    """One exchange: what this rank reads, in the thread, and what the others are to have read.

    Args:
        number: of the exchange.
        told: whom to tell of which tensor.
        reads: whether there is anything to read.
    """

    def __init__(self, number: int, told: Sequence[tuple[_Peer, Tensor]], *, reads: bool) -> None:
        self._number = number
        self._told = [peer for peer, _ in told]
        self._error: Exception | None = None
        self._over = threading.Event()
        if not reads:
            self._over.set()
        for peer, tensor in told:
            peer.wait_for_reading(number - _UNREAD)
            peer.tell_where(number, tensor)

    def run(self, read: Callable[[int], None], sources: Sequence[_Peer]) -> None:
        """Read; what goes wrong is raised by `wait`, here and at those that would be read from."""
        try:
            read(self._number)
        except Exception as error:
            self._error = error
        failed = self._error is not None
        for peer in sources:
            try:
                peer.tell_that_it_is_read(self._number, failed=failed)
            except RuntimeError as error:
                self._error = self._error or error
        self._over.set()

    @override
    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error
        for peer in self._told:
            peer.wait_for_reading(self._number)


class _Peer:
    """Another rank of the same host.

    Args:
        rank: its number, for a message.
        process: its id.
        where: the connection for what is told before it is read.
        done: the connection for what is told then.
    """

    def __init__(self, rank: int, process: int, where: socket.socket, done: socket.socket) -> None:
        self.rank = rank
        self._process = process
        self._where = where
        self._done = done
        self._told: deque[tuple[int, Tensor]] = deque()
        """The exchanges that it hasn't read yet, so far as is known, and what it reads there: nobody may have the
        memory in the meantime, even if nobody waits for the exchange any more."""

    def tell_where(self, number: int, tensor: Tensor) -> None:
        """Have it read a tensor."""
        self._told.append((number, tensor))
        self._send(self._where, number, tensor.data_ptr())

    def wait_for_reading(self, number: int) -> None:
        """Return when it has read whatever it was told of in an exchange up to this one."""
        while self._told and (first := self._told[0][0]) <= number:
            failed = self._receive(self._done, first)
            self._told.popleft()
            if failed:
                raise RuntimeError(f"rank {self.rank} couldn't read what its peers sent: look for the error there")

    def is_told_where(self, number: int) -> int:
        """The address of what it lets this rank read in an exchange."""
        return self._receive(self._where, number)

    def read(self, begin: int, into: Tensor) -> None:
        """Fill a tensor from an address of its memory."""
        try:
            _read_memory(self._process, begin, into.data_ptr(), into.nbytes)
        except OSError as error:
            raise RuntimeError(f"the memory of rank {self.rank} can't be read any more: {error.strerror}") from error

    def tell_that_it_is_read(self, number: int, *, failed: bool) -> None:
        """This rank has read all of an exchange, or can't."""
        self._send(self._done, number, failed)

    def _send(self, connection: socket.socket, number: int, word: int) -> None:
        try:
            connection.send(_MESSAGE.pack(number, word))
        except OSError as error:
            raise RuntimeError(f"the connection to rank {self.rank} is closed: {error}") from error

    def _receive(self, connection: socket.socket, number: int) -> int:
        try:
            message = connection.recv(_MESSAGE.size)
        except TimeoutError as error:
            raise RuntimeError(f"rank {self.rank} wasn't heard of for {connection.gettimeout()} s") from error
        except OSError as error:
            raise RuntimeError(f"the connection to rank {self.rank} is closed: {error}") from error
        if not message:
            raise RuntimeError(f"the connection to rank {self.rank} is closed by it: look for the error there")
        exchange, word = _MESSAGE.unpack(message)
        if exchange != number:
            raise RuntimeError(f"rank {self.rank} is at exchange {exchange}, and this rank at {number}")
        return int(word)

    def leave(self) -> None:
        """End the conversation; whoever waits for a word goes on with an error, here as there."""
        for connection in (self._where, self._done):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections, which nobody uses any more."""
        self._where.close()
        self._done.close()


# ----------------------------------------------------------------------------------------------- how it is agreed on


def _connect(group: dist.ProcessGroup, timeout: timedelta) -> MemoryReads | None:
    """Connect with all peers, if every rank can read the memory of all. A collective."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if sys.platform != "linux" or world_size == 1:
        return None
    secret = ctypes.create_string_buffer(secrets.token_bytes(_SECRET_BYTES), _SECRET_BYTES)
    opened: dict[tuple[int, int], socket.socket] = {}
    listening = _listen(2 * world_size)
    with listening or nullcontext():
        everyone: list[Any] = [None] * world_size
        name = b"" if listening is None else listening.getsockname()
        about = os.getpid(), ctypes.addressof(secret), secret.raw, name
        dist.all_gather_object(everyone, about, group=group)
        try:
            for peer, (process, address, expected, name) in enumerate(everyone):
                _require_readable(process, address, expected)
                for purpose in _PURPOSES if peer < rank else ():
                    opened[peer, purpose] = connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    connection.settimeout(timeout.total_seconds())
                    connection.connect(name)
                    connection.send(_HELLO.pack(expected, rank, purpose))
            able = listening is not None
        except (OSError, AttributeError):  # or the C library has no such function
            able = False
        agreed = torch.tensor([able], dtype=torch.uint8)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
        if listening is None or not agreed:
            for connection in opened.values():
                connection.close()
            return None
        while len(opened) < len(_PURPOSES) * (world_size - 1):  # all have called already, and said who they are
            connection, _ = listening.accept()
            hello = b""
            with suppress(OSError):  # it is a stranger who says nothing: any process of the host can call
                hello = connection.recv(_HELLO.size, socket.MSG_DONTWAIT)
            connection.settimeout(timeout.total_seconds())
            if len(hello) == _HELLO.size and hello.startswith(secret.raw):
                _, peer, purpose = _HELLO.unpack(hello)
                opened[peer, purpose] = connection
            else:
                connection.close()
    return MemoryReads(
        rank,
        {
            peer: _Peer(peer, process, *(opened[peer, purpose] for purpose in _PURPOSES))
            for peer, (process, *_) in enumerate(everyone)
            if peer != rank
        },
    )


def _listen(backlog: int) -> socket.socket | None:
    """A socket that peers can connect to; None where the system has none of the kind."""
    listening = None
    try:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind("")  # the system finds a name, which is no file's: unix(7), "autobind"
        listening.listen(backlog)
    except OSError:
        if listening is not None:
            listening.close()
        return None
    return listening


def _require_readable(process: int, address: int, expected: bytes) -> None:
    """Make sure that a process can be read, and is the one that is meant: another host may have one of the same id.

    Raises:
        OSError: it isn't so.
    """
    seen = ctypes.create_string_buffer(len(expected))
    _read_memory(process, address, ctypes.addressof(seen), len(expected))
    if seen.raw != expected:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))  # struct iovec


def _read_memory(process: int, begin: int, into: int, nbytes: int) -> None:
    """Copy another process's memory from one address to another of this process.

    Raises:
        OSError: the system forbids it, or there is no such memory.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call = _libc().process_vm_readv
    while nbytes:
        there, here = _Range(begin, nbytes), _Range(into, nbytes)
        count = call(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            number = ctypes.get_errno() or errno.EFAULT
            raise OSError(number, os.strerror(number))
        begin, into, nbytes = begin + count, into + count, nbytes - count


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    address, count = ctypes.c_void_p, ctypes.c_ulong
    libc.process_vm_readv.argtypes = [ctypes.c_int, address, count, address, count, count]
    return libc
