"""Reduce-scatter and all-gather over the shards of a flat buffer, by the way that is fast on the backend at hand.

Gloo's own `reduce_scatter_tensor` and `all_gather_into_tensor` take 2 to 4 times as long as its `all_reduce`; a
direct exchange of shards (see `transport`) takes less. NCCL's own are the fast ones there. Both ways are
behind one interface, which is all that the rest of the engine knows.

Every operation is asynchronous: it gives back a `Pending`, and its result stands when `wait()` has returned. All
ranks must issue the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager
from typing_extensions import override

from lightning_zero.engine.buffers import BufferPool
from lightning_zero.engine.transport import Pending, Sockets, Then, Transport, Works, transport_for
from lightning_zero.segments import Shards

_T = TypeVar("_T")


class Collectives(Protocol):
    """What ZeRO asks of a process group. `Shards` says which part of a flat buffer is whose; it may be nobody's."""

    rank: int
    world_size: int
    equal_shards: bool
    """Whether all shards of a buffer should be of one length."""
    agreement_is_cheap: bool
    """Whether a small blocking all-reduce costs little against a backward pass: not where it stalls a stream."""

    def reduce_scatter(self, flat: Tensor, shards: Shards, out: Tensor, *, accumulate: bool) -> Pending:
        """Sum `flat` over the ranks; this rank's shard of the sum replaces `out`, or is added to it.

        `flat` belongs to the operation until `wait()` has returned, and is scratch memory afterwards.
        """

    def all_gather(self, flat: Tensor, shards: Shards) -> Pending:
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


def collectives_for(
    group: dist.ProcessGroup,
    device: torch.device | None = None,
    timeout: timedelta | None = None,
) -> Collectives:
    """The fastest way known for the group's backend. A collective.

    Args:
        group: of ranks.
        device: where the tensors are; on the CPU by default.
        timeout: how long a rank waits for another, where it isn't the group that waits; None: torch's default.
    """
    if dist.get_backend(group) == "nccl":
        return NativeCollectives(group)
    exchanging = ExchangeCollectives if device is None or device.type == "cpu" else HostCollectives
    return exchanging(group, transport_for(group, timeout or dist.default_pg_timeout))


class _Group(Collectives):
    """What both ways share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._peers = dist.get_process_group_ranks(group)

    @override
    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=self._group)

    @override
    def broadcast(self, tensor: Tensor) -> Pending:
        work = dist.broadcast(tensor, src=self._peers[0], group=self._group, async_op=True)
        return Works([work])

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
    """Every rank sends each other rank its shard directly: for the CPU, where gloo's own collectives are slow."""

    equal_shards = False
    agreement_is_cheap = True

    def __init__(self, group: dist.ProcessGroup, transport: Transport | None = None) -> None:
        super().__init__(group)
        self._transport = transport or Sockets(group)

    @override
    def release(self) -> None:
        self._transport.release()
        super().release()

    @override
    def reduce_scatter(self, flat: Tensor, shards: Shards, out: Tensor, *, accumulate: bool) -> Pending:
        own = slice(*shards.of(self.rank))
        sent = [(owner, flat[start:stop]) for owner, start, stop in shards if owner != self.rank]
        return self._transport.sum(flat[own], out, sent, accumulate=accumulate)

    @override
    def all_gather(self, flat: Tensor, shards: Shards) -> Pending:
        begin, end = shards.of(self.rank)
        return self._transport.exchange(
            received=[(owner, flat[start:stop]) for owner, start, stop in shards if owner != self.rank],
            sent=[(rank, flat[begin:end]) for rank in range(self.world_size) if begin < end and rank != self.rank],
        )


class HostCollectives(ExchangeCollectives):
    """The same by way of the host: gloo sends and receives no memory of a device.

    For ranks that share a GPU, and for machines without NCCL.
    """

    def __init__(self, group: dist.ProcessGroup, transport: Transport | None = None) -> None:
        super().__init__(group, transport)
        self._staged = BufferPool()

    @override
    def reduce_scatter(self, flat: Tensor, shards: Shards, out: Tensor, *, accumulate: bool) -> Pending:
        host = self._staged.take(flat.numel(), flat.dtype, torch.device("cpu"))
        host.copy_(flat)
        summed = self._staged.take(out.numel(), out.dtype, torch.device("cpu"))

        def bring() -> None:
            _bring(summed, out, accumulate)
            self._staged.give_back(host)
            self._staged.give_back(summed)

        return Then(super().reduce_scatter(host, shards, summed, accumulate=False), bring)

    @override
    def all_gather(self, flat: Tensor, shards: Shards) -> Pending:
        host = self._staged.take(flat.numel(), flat.dtype, torch.device("cpu"))
        own = slice(*shards.of(self.rank))
        host[own].copy_(flat[own])

        def bring() -> None:
            flat.copy_(host)
            self._staged.give_back(host)

        return Then(super().all_gather(host, shards), bring)


class NativeCollectives(_Group):
    """The backend's own collectives: for NCCL."""

    equal_shards = True
    agreement_is_cheap = False

    @override
    def reduce_scatter(self, flat: Tensor, shards: Shards, out: Tensor, *, accumulate: bool) -> Pending:
        begin, end = shards.of(self.rank)
        own = flat[begin:end]
        if self._are_equal(shards):
            result = own if accumulate or out.dtype != flat.dtype else out
            works = [_reduce_scatter_equal(result, flat, group=self._group, async_op=True)]
        else:
            result, works = own, self._with_each_owner(dist.reduce, flat, shards)
        return Then(Works(works), partial(_bring, result, out, accumulate))

    @override
    def all_gather(self, flat: Tensor, shards: Shards) -> Pending:
        if self._are_equal(shards):
            begin, end = shards.of(self.rank)
            return Works([_all_gather_equal(flat, flat[begin:end], group=self._group, async_op=True)])
        return Works(self._with_each_owner(dist.broadcast, flat, shards))

    def _are_equal(self, shards: Shards) -> bool:
        lengths = [stop - start for _, start, stop in shards]
        return len(lengths) in (0, self.world_size) and len(set(lengths)) <= 1

    def _with_each_owner(
        self, operation: Callable[..., dist.Work | None], flat: Tensor, shards: Shards
    ) -> list[dist.Work | None]:
        """Reduce each shard to its owner, or broadcast it from there, in place and all at once.

        So torch's own operations do it for a list of unequal tensors; but for the empty ones too, and those are
        thousands where a bucket has a few owners: see [Note: rounds].
        """
        at_once = len(shards.owners) > 1 and flat.is_cuda  # gloo, which the tests have, can't
        with _coalescing_manager(self._group, flat.device, async_ops=True) if at_once else nullcontext() as together:
            works = [
                operation(flat[start:stop], self._peers[owner], group=self._group, async_op=True)
                for owner, start, stop in shards
            ]
        return works if together is None else together.works


# torch 2.13 renames both and warns at the old names, the only ones that torch 2.6 has.
_reduce_scatter_equal = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _bring(result: Tensor, out: Tensor, accumulate: bool) -> None:
    """Bring a result to where it was asked for, perhaps on another device."""
    if accumulate:
        out.add_(result.to(out.device))
    elif result is not out:
        out.copy_(result)
