"""Reduce-scatter and all-gather over the shards of a flat buffer, by the way that is fast on the backend at hand.

Gloo's own `reduce_scatter_tensor` and `all_gather_into_tensor` take 2 to 4 times as long as its `all_reduce`; a
direct exchange of shards by point-to-point messages takes less. NCCL's own are the fast ones there. Both ways are
behind one interface, which is all that the rest of the engine knows.

Every operation is asynchronous: it gives back a `Pending`, and its result stands when `wait()` has returned. All
ranks must issue the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_zero.engine.buffers import BufferPool

_T = TypeVar("_T")


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the result stands (on CUDA: when the current stream is made to wait for it)."""


class Collectives(Protocol):
    """What ZeRO asks of a process group. A *shard* is `flat[bounds[rank]:bounds[rank + 1]]`."""

    rank: int
    world_size: int
    equal_shards: bool
    """Whether all shards of a buffer should be of one length."""
    agreement_is_cheap: bool
    """Whether a small blocking all-reduce costs little against a backward pass: not where it stalls a stream."""

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, *, accumulate: bool) -> Pending:
        """Sum `flat` over the ranks; this rank's shard of the sum replaces `out`, or is added to it.

        `flat` belongs to the operation until `wait()` has returned, and is scratch memory afterwards.
        """

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> Pending:
        """Fill `flat` in place with every rank's own shard."""

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce a small tensor in place, and wait for it."""

    def broadcast(self, tensor: Tensor) -> Pending:
        """Give every rank the first rank's tensor, in place."""

    def broadcast_all(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the first rank's tensors, of whatever dtypes, in place, and wait for it."""

    def all_gather_object(self, value: _T) -> list[_T]:
        """Every rank's value, in the order of the ranks. It is pickled: for what is small or seldom asked for."""

    def release(self) -> None:
        """Let go of the process group; nothing can be sent after that."""


def collectives_for(group: dist.ProcessGroup, device: torch.device | None = None) -> Collectives:
    """The fastest way known for the group's backend, and for tensors on a device (the CPU by default)."""
    if dist.get_backend(group) == "nccl":
        return NativeCollectives(group)
    return ExchangeCollectives(group) if device is None or device.type == "cpu" else HostCollectives(group)


class _Group(Collectives):
    """What both ways share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    @override
    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=self._group)

    @override
    def broadcast(self, tensor: Tensor) -> Pending:
        work = dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self._group, async_op=True)
        return _Works([work])

    @override
    def broadcast_all(self, tensors: Sequence[Tensor]) -> None:
        if self.world_size > 1 and tensors:
            # As DistributedDataParallel does it with buffers: flattened by dtype, 250 MiB at a time.
            dist._broadcast_coalesced(self._group, list(tensors), 250 * 2**20, 0)  # type: ignore[attr-defined]

    @override
    def release(self) -> None:
        del self._group

    @override
    def all_gather_object(self, value: _T) -> list[_T]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class ExchangeCollectives(_Group):
    """Every rank sends each other rank its shard directly: for gloo, whose own collectives are slow."""

    equal_shards = False
    agreement_is_cheap = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._peers = [dist.get_global_rank(group, rank) for rank in range(self.world_size)]
        self._received = BufferPool()

    @override
    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, *, accumulate: bool) -> Pending:
        size = bounds[self.rank + 1] - bounds[self.rank]
        buffer = self._received.take(size * (self.world_size - 1), flat.dtype, flat.device)
        pieces: list[Tensor] = []
        works = []
        for rank in range(self.world_size):
            outgoing = flat[bounds[rank] : bounds[rank + 1]]
            if rank == self.rank:
                pieces.append(outgoing)
                continue
            if size:
                place = rank - (rank > self.rank)
                pieces.append(buffer[place * size : (place + 1) * size])
                works.append(dist.irecv(pieces[-1], src=self._peers[rank], group=self._group))
            if outgoing.numel():
                works.append(dist.isend(outgoing, dst=self._peers[rank], group=self._group))
        return _ExchangedSum(works, pieces, out, accumulate, self._received, buffer)

    @override
    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> Pending:
        own = flat[bounds[self.rank] : bounds[self.rank + 1]]
        works = []
        for rank in range(self.world_size):
            incoming = flat[bounds[rank] : bounds[rank + 1]]
            if rank == self.rank:
                continue
            if incoming.numel():
                works.append(dist.irecv(incoming, src=self._peers[rank], group=self._group))
            if own.numel():
                works.append(dist.isend(own, dst=self._peers[rank], group=self._group))
        return _Works(works)


class HostCollectives(ExchangeCollectives):
    """The same by way of the host: gloo sends and receives no memory of a device.

    For ranks that share a GPU, and for machines without NCCL.
    """

    @override
    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, *, accumulate: bool) -> Pending:
        host = self._received.take(flat.numel(), flat.dtype, torch.device("cpu"))
        host.copy_(flat)
        summed = self._received.take(out.numel(), out.dtype, torch.device("cpu"))
        pending = super().reduce_scatter(host, bounds, summed, accumulate=False)
        return _Unstaged(pending, out, accumulate, summed, (host, summed), self._received)

    @override
    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> Pending:
        host = self._received.take(flat.numel(), flat.dtype, torch.device("cpu"))
        own = slice(bounds[self.rank], bounds[self.rank + 1])
        host[own].copy_(flat[own])
        return _Unstaged(super().all_gather(host, bounds), flat, False, host, (host,), self._received)


class NativeCollectives(_Group):
    """The backend's own collectives: for NCCL."""

    equal_shards = True
    agreement_is_cheap = False

    @override
    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int], out: Tensor, *, accumulate: bool) -> Pending:
        shards = _shards(flat, bounds)
        result = shards[self.rank] if accumulate or out.dtype != flat.dtype else out
        if len({shard.numel() for shard in shards}) == 1:
            work = _reduce_scatter_equal(result, flat, group=self._group, async_op=True)
        else:
            work = dist.reduce_scatter(result, shards, group=self._group, async_op=True)
        return _Moved([work], result, out, accumulate)

    @override
    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> Pending:
        shards = _shards(flat, bounds)
        if len({shard.numel() for shard in shards}) == 1:
            work = _all_gather_equal(flat, shards[self.rank], group=self._group, async_op=True)
        else:
            work = dist.all_gather(shards, shards[self.rank], group=self._group, async_op=True)
        return _Works([work])


# torch 2.13 renames both and warns at the old names, the only ones that torch 2.6 has.
_reduce_scatter_equal = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _shards(flat: Tensor, bounds: Sequence[int]) -> list[Tensor]:
    return [flat[start:stop] for start, stop in pairwise(bounds)]


class _Works:
    """Waits for a list of works."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()


class _ExchangedSum(_Works):
    """Sums the exchanged pieces in the order of the ranks, so that the result doesn't depend on who owns it."""

    def __init__(
        self,
        works: Sequence[dist.Work | None],
        pieces: Sequence[Tensor],
        out: Tensor,
        accumulate: bool,
        pool: BufferPool,
        buffer: Tensor,
    ) -> None:
        super().__init__(works)
        self._pieces, self._out, self._accumulate = pieces, out, accumulate
        self._pool, self._buffer = pool, buffer

    def wait(self) -> None:
        super().wait()
        first, *others = self._pieces
        if not self._accumulate and others and first.dtype == self._out.dtype:
            torch.add(first, others[0], out=self._out)
            others = others[1:]
        elif not self._accumulate:
            self._out.copy_(first)
        elif first.dtype == self._out.dtype:
            # The sum of this backward first, and then onto what is there: as DDP adds an averaged gradient.
            for piece in others:
                first.add_(piece)
            self._out.add_(first)
            others = []
        else:
            self._out.add_(first)
        for piece in others:
            self._out.add_(piece)
        self._pool.give_back(self._buffer)


class _Unstaged:
    """Brings a result from the host to its device, and gives the host's buffers back."""

    def __init__(
        self,
        pending: Pending,
        target: Tensor,
        accumulate: bool,
        result: Tensor,
        buffers: Sequence[Tensor],
        pool: BufferPool,
    ) -> None:
        self._pending, self._target, self._accumulate = pending, target, accumulate
        self._result, self._buffers, self._pool = result, buffers, pool

    def wait(self) -> None:
        self._pending.wait()
        if self._accumulate:
            self._target.add_(self._result.to(self._target.device))
        else:
            self._target.copy_(self._result)
        for buffer in self._buffers:
            self._pool.give_back(buffer)


class _Moved(_Works):
    """Brings the result to where it was asked for."""

    def __init__(self, works: Sequence[dist.Work | None], result: Tensor, out: Tensor, accumulate: bool) -> None:
        super().__init__(works)
        self._result, self._out, self._accumulate = result, out, accumulate

    def wait(self) -> None:
        super().wait()
        if self._accumulate:
            self._out.add_(self._result)
        elif self._result is not self._out:
            self._out.copy_(self._result)
