"""Gradients on their way from backward to the segments.

[Note: the way of a gradient]
Backward accumulates a parameter's gradient; a hook moves it into its bucket's buffer, divided by the number of
ranks, and frees it. A full bucket is reduce-scattered while backward goes on. When backward is over, `flush` sends
what is left, and `finish` waits: each rank's shard of the averaged gradient stands. A second backward adds to it.

From then on `parameter.grad` is a *stand-in* (see `stand_in`): it has the shape and takes no memory, and being there
says that the segments hold a gradient. So whatever drops or zeroes gradients (`optimizer.zero_grad()`,
`module.zero_grad()`, `parameter.grad = None`) does what it says.

| `parameter.grad` when a gradient comes | what it does to the segments       |
|----------------------------------------|------------------------------------|
| None                                   | replaces what they hold            |
| a tensor (stage 1, accumulating)       | replaces it, with what is in there |
| the stand-in                           | adds to what they hold             |

At stage 1 under `no_sync` a gradient stays whole in `parameter.grad` (or with the stand-in) and is reduced once.
With one rank no gradient moves anywhere: the segments' gradients are views of `parameter.grad`.

[Note: the same collectives on every rank]
What a rank sends must not depend on which gradients it has: another may have others. So between two flushes every
rank sends every bucket that has a parameter to train, once and in the same order, full of zeros if need be. What
comes for a bucket that is gone already (a second backward that nobody flushed, a layer that runs again in a reentrant
checkpoint) waits for the flush, which then goes round once more. The order is learned: after the first backward all
take the order in which rank 0's buckets were full, so that buckets leave, and gradients are freed, as backward goes,
whatever order the module defines its layers in.

Which parameters had a gradient on *any* rank is agreed on at each flush where that is cheap or asked for
(`find_unused_parameters`): a parameter without one on every rank must keep `None`, or AdamW would decay it. Under
`no_sync` nobody waits for that: till the last backward a parameter without a gradient has a *tentative* stand-in, as
another rank may have had one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_zero.engine import norms
from lightning_zero.engine.buckets import ParameterBucket, Piece, Slot
from lightning_zero.engine.buffers import BufferPool, is_unshared
from lightning_zero.engine.collectives import Collectives
from lightning_zero.engine.stand_in import PartitionedGradient
from lightning_zero.engine.transport import Pending

_T = TypeVar("_T")

_IN_FLIGHT = 2
"""Buckets whose reduction may be under way; one more waits for the oldest, which bounds the memory."""


class GradientReducer:
    """Averages gradients over the ranks, each rank keeping its shards.

    Args:
        collectives: the ranks.
        stage: 1: gradients accumulate whole under `no_sync`. 2: they are reduced after every backward.
        reduce_dtype: what travels; the parameter's own dtype by default.
        find_unused_parameters: agree after each backward on which parameters had a gradient anywhere.
    """

    def __init__(
        self,
        collectives: Collectives,
        *,
        stage: int,
        reduce_dtype: torch.dtype | None = None,
        find_unused_parameters: bool = False,
    ) -> None:
        self._collectives = collectives
        self._stage = stage
        self._reduce_dtype = reduce_dtype
        self._agree = find_unused_parameters or collectives.agreement_is_cheap
        self._accumulating = False
        self._pool = BufferPool()
        self._buckets: list[ParameterBucket] = []
        self._slots: dict[str, tuple[int, Slot]] = {}
        self._pieces: dict[str, Piece] = {}
        self._stand_ins: dict[str, PartitionedGradient] = {}
        self._hooks: list[RemovableHandle] = []
        self._in_flight: list[tuple[Pending, Tensor, ParameterBucket]] = []
        self._buffers: dict[int, Tensor] = {}
        self._order: list[int] = []
        self._order_is_learned = False
        self._norms: dict[float, dict[str, Tensor]] = {}  # of the gradients as they are
        self._unagreed = False  # there are tentative stand-ins
        self._has_memory = False  # there are buffers, and shards of gradients
        # Since the last flush:
        self._open = False
        self._queue: list[int] = []
        self._sent = 0
        self._gone: set[int] = set()  # the first `_sent` of the queue
        self._missing: dict[int, int] = {}
        self._full: list[int] = []

    def add(self, buckets: Sequence[ParameterBucket]) -> None:
        """Take buckets in, in the order in which backward is expected to fill them, behind those that are there."""
        first = len(self._buckets)
        self._buckets += buckets
        if not self.is_distributed:
            return
        self._order += range(first, len(self._buckets))
        self._order_is_learned = False
        for index, bucket in enumerate(buckets, first):
            for slot in bucket.slots:
                self._pieces.pop(slot.name, None)  # another parameter may have had the name
                self._slots[slot.name] = (index, slot)
                self._stand_ins[slot.name] = PartitionedGradient.of(slot.name, slot.parameter, self)
                self._hooks.append(self._hook(index, slot))
            self._pieces |= {piece.slot.name: piece for piece in bucket.pieces}

    def _hook(self, index: int, slot: Slot) -> RemovableHandle:
        parameter, requires_grad = slot.parameter, slot.parameter.requires_grad
        parameter.requires_grad_(True)  # a frozen parameter may be unfrozen later, and takes no hook while frozen
        try:
            hook: RemovableHandle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _: self._on_gradient(index, slot)
            )
            return hook
        finally:
            parameter.requires_grad_(requires_grad)

    def let_others_hooks_go_first(self) -> None:
        """Let hooks that somebody has added since then have each gradient while it is whole, as under DDP."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [self._hook(index, slot) for index, slot in self._slots.values()]

    def detach(self) -> None:
        """Remove the hooks, and the stand-ins that would outlive what they stand for."""
        for hook in self._hooks:
            hook.remove()
        for _, slot in self._slots.values():
            if isinstance(slot.parameter.grad, PartitionedGradient):
                slot.parameter.grad = None
        self._hooks.clear()
        self._in_flight.clear()
        self._buffers.clear()
        self._pool.clear()

    @property
    def buffer_bytes(self) -> int:
        """Of the buffers in which whole gradients travel, in use or kept for the next."""
        return self._pool.nbytes

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """At stage 1, let gradients accumulate without communication; at stage 2 they are reduced all the same."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @property
    def is_distributed(self) -> bool:
        """Whether there is anybody to share with."""
        return self._collectives.world_size > 1

    @property
    def is_syncing(self) -> bool:
        """Whether gradients are to be the same on all ranks when a backward is over: not under `no_sync`."""
        return not self._accumulating

    @property
    def _reduces(self) -> bool:
        """Whether a backward's gradients are reduced."""
        return self._stage > 1 or not self._accumulating

    # --- while backward goes on ---

    def _on_gradient(self, index: int, slot: Slot) -> None:
        if not self._reduces:
            if self._has_memory:
                self._let_go()
            return
        if not self._open:
            self._begin()
        if index in self._gone or index not in self._missing:  # it is gone, or has been added since the first gradient
            self._keep_for_flush(slot)
            return
        self._missing[index] -= not slot.deposited
        self._deposit(index, slot, own_memory=True)
        if self._missing[index] == 0:
            self._full.append(index)
        while self._sent < len(self._queue) and self._missing[self._queue[self._sent]] <= 0:
            self._send_next()

    def _let_go(self) -> None:
        """Gradients accumulate whole from here on: free the buffers and shards, which only the last backward needs."""
        self._has_memory = False
        self._pool.clear()
        for bucket in self._buckets:
            if not any(isinstance(slot.parameter.grad, PartitionedGradient) for slot in bucket.slots):
                bucket.release_gradient()

    def _keep_for_flush(self, slot: Slot) -> None:
        """A gradient whose bucket is gone waits with the stand-in, so that it isn't taken for a whole one."""
        gradient = slot.parameter.grad
        if gradient is not None and not isinstance(gradient, PartitionedGradient):
            self._install_stand_in(slot)
            stand_in = self._stand_ins[slot.name]
            stand_in.pending, stand_in.replaces = gradient, True

    def _begin(self) -> None:
        self._open = True
        self._sent = 0
        self._gone.clear()
        self._full = []
        self._missing = {
            index: sum(slot.parameter.requires_grad for slot in bucket.slots)
            for index, bucket in enumerate(self._buckets)
        }
        self._queue = [index for index in self._order if self._missing[index]]

    @torch.no_grad()
    def _deposit(self, index: int, slot: Slot, *, own_memory: bool) -> None:
        """Move a gradient from its parameter into the bucket's buffer; the parameter keeps the stand-in."""
        gradient, bucket = _local_gradient(slot), self._buckets[index]
        if gradient is None:
            return
        stand_in = slot.parameter.grad
        onto_stand_in = isinstance(stand_in, PartitionedGradient) and not stand_in.replaces
        joins = onto_stand_in and slot.deposited
        slot.continues = slot.continues if joins else onto_stand_in
        slot.deposited = True
        self._install_stand_in(slot)
        dtype = self._reduce_dtype or bucket.dtype
        share = 1.0 / self._collectives.world_size
        # Autograd may have made a view of another gradient of it; and it is asked before there is a view of it here
        own_memory = own_memory and is_unshared(gradient)
        flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        fills_bucket = flat.numel() == bucket.plan.numel and flat.dtype == dtype
        if own_memory and fills_bucket and not onto_stand_in and index not in self._buffers:
            self._buffers[index] = flat.mul_(share)  # its own memory is the buffer
            return
        region = self._buffer(index)[slot.offset : slot.offset + flat.numel()]
        if joins:
            region.add_(flat.to(dtype), alpha=share)
        elif flat.dtype == dtype:
            torch.mul(flat, share, out=region)
        else:
            region.copy_(flat).mul_(share)

    def _install_stand_in(self, slot: Slot) -> None:
        stand_in = self._stand_ins[slot.name]
        stand_in.pending, stand_in.replaces, stand_in.tentative = None, False, False
        slot.parameter.grad = stand_in

    def _buffer(self, index: int) -> Tensor:
        if index not in self._buffers:
            self._wait(keep=_IN_FLIGHT - 1)
            bucket = self._buckets[index]
            dtype = self._reduce_dtype or bucket.dtype
            self._buffers[index] = self._pool.take(bucket.plan.numel, dtype, bucket.device)
        return self._buffers[index]

    @torch.no_grad()
    def _send_next(self) -> None:
        index = self._queue[self._sent]
        self._sent += 1
        self._gone.add(index)
        bucket, buffer = self._buckets[index], self._buffer(index)
        del self._buffers[index]
        for slot in bucket.slots:
            holds = isinstance(slot.parameter.grad, PartitionedGradient)
            if not slot.deposited or not holds:  # none has come, or it was dropped again
                buffer[slot.offset : slot.offset + slot.parameter.numel()].zero_()
                slot.continues = holds
            slot.deposited = False
        fresh = [piece for piece in bucket.pieces if not piece.slot.continues]
        accumulate = len(fresh) < len(bucket.pieces)
        self._wait(keep=_IN_FLIGHT - 1, bucket=bucket)
        if accumulate:
            for piece in fresh:
                bucket.gradient[piece.offset : piece.offset + piece.segment.numel].zero_()
        pending = self._collectives.reduce_scatter(buffer, bucket.plan.shards, bucket.gradient, accumulate=accumulate)
        self._in_flight.append((pending, buffer, bucket))

    def _wait(self, keep: int, bucket: ParameterBucket | None = None) -> None:
        """Wait for the oldest reductions until at most `keep` are under way, and none of `bucket`."""
        while len(self._in_flight) > keep or any(target is bucket for _, _, target in self._in_flight):
            pending, buffer, _ = self._in_flight.pop(0)
            with torch.no_grad():
                pending.wait()
            self._pool.give_back(buffer)

    # --- when it is over ---

    def flush(self) -> None:
        """A backward is over on every rank: send what it left. See [Note: the same collectives on every rank]."""
        if self._reduces and self.is_distributed and self._buckets:
            self._flush(agree=not self._accumulating)

    def finish(self) -> None:
        """Return when every gradient that was accumulated so far stands in its segments. A collective."""
        self._finish(self._slots)

    def _finish(self, names: Iterable[str]) -> None:
        """The same for those of some parameters, at least."""
        if not self.is_distributed or not self._buckets:
            return
        slots = (self._slots[name][1] for name in names)
        left = self._open or self._unagreed or any(_local_gradient(slot) is not None for slot in slots)
        if self.agreed([left])[0]:
            self._flush(agree=True)
        self._wait(keep=0)

    def forget_norms(self) -> None:
        """Gradients were changed past their stand-ins."""
        self._norms.clear()

    def _flush(self, *, agree: bool) -> None:
        self.forget_norms()
        self._has_memory = True
        late = True
        while late:
            if not self._open:
                self._begin()
            self._send_rest()
            if agree:  # only now: in its backward, another rank may be waiting for what was left here
                self._queue += self._frozen_with_gradients()
                self._send_rest()
            if not self._order_is_learned:
                self._learn_order()
            self._open = False
            if not agree:
                self._stand_in_tentatively()
                return
            late = self._agree_on_holders()

    def _send_rest(self) -> None:
        """Send the rest of the queue, with whatever gradients are there."""
        unsent = set(self._queue[self._sent :])
        for index, slot in self._slots.values():
            if index in unsent:
                self._deposit(index, slot, own_memory=False)
        while self._sent < len(self._queue):
            self._send_next()

    def _stand_in_tentatively(self) -> None:
        """Another rank may have had a gradient where this one has none: what comes next adds to it."""
        self._unagreed = True
        for index in self._queue:
            for slot in self._buckets[index].slots:
                if slot.parameter.grad is None:
                    self._install_stand_in(slot)
                    self._stand_ins[slot.name].tentative = True

    def _agree_on_holders(self) -> bool:
        """Let a parameter have a stand-in where any rank had a gradient; say whether anything is left to be sent."""
        slots = [slot for _, slot in self._slots.values()]
        late = any(_local_gradient(slot) is not None for slot in slots)
        *held, late = self.agreed([*map(_has_gradient, slots), late])
        for slot, held_anywhere in zip(slots, held, strict=True):
            if not held_anywhere:
                slot.parameter.grad = None
            elif not _has_gradient(slot):
                self._install_stand_in(slot)
        self._unagreed = False
        return late

    def _frozen_with_gradients(self) -> list[int]:
        """Buckets that were frozen when a gradient of theirs was not reduced yet, on any rank."""
        queued = set(self._queue)
        frozen = [index for index in self._order if index not in queued]
        if not frozen:
            return []
        left = self.agreed([any(_local_gradient(s) is not None for s in self._buckets[i].slots) for i in frozen])
        return [index for index, has in zip(frozen, left, strict=True) if has]

    def agreed(self, flags: Sequence[bool], device: torch.device | None = None) -> list[bool]:
        """Each flag that is set on any rank, as far as the ranks are to agree on it; with a device given, always."""
        if not flags or not (self._agree or device):
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8).to(device or self._buckets[0].device)
        self._collectives.all_reduce(tensor, dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def everyones(self, value: _T) -> list[_T]:
        """Every rank's value, in the order of the ranks. A collective."""
        return self._collectives.all_gather_object(value)

    def _learn_order(self) -> None:
        self._order_is_learned = True
        if self._buckets:
            order = list(dict.fromkeys((*self._full, *self._order)))
            tensor = torch.tensor(order).to(self._buckets[0].device)
            self._collectives.broadcast(tensor).wait()
            self._order = tensor.tolist()

    # --- what is done to the gradients through their stand-ins: see `stand_in.Holder` ---

    def _held(self, names: Iterable[str]) -> list[Tensor]:
        """This rank's parts of some parameters' gradients, each a view of its bucket's shard."""
        owned = ((self._slots[name][0], self._pieces[name]) for name in names if name in self._pieces)
        return [
            self._buckets[index].gradient[piece.offset : piece.offset + piece.segment.numel] for index, piece in owned
        ]

    def zero(self, name: str) -> None:
        """Set what is held of one parameter's gradient to zero."""
        self._wait(keep=0)
        self._norms.clear()
        index, slot = self._slots[name]
        if slot.deposited:
            self._buffers[index][slot.offset : slot.offset + slot.parameter.numel()].zero_()
            slot.continues = False
        for part in self._held([name]):
            part.zero_()

    @torch.no_grad()
    def change(self, names: Sequence[str], how: Callable[[list[Tensor]], object]) -> None:
        """Apply a function to this rank's parts of some parameters' gradients, in place. A collective."""
        self._finish(names)
        self._norms.clear()
        parts = self._held(names)
        if parts:
            how(parts)

    def norms(self, names: Sequence[str], norm_type: float) -> list[Tensor]:
        """The norms of some parameters' whole gradients. A collective: those of all are computed at once, and kept."""
        self._finish(names)
        if norm_type not in self._norms:
            parts = [
                self._held([name]) if isinstance(slot.parameter.grad, PartitionedGradient) else []
                for name, (_, slot) in self._slots.items()
            ]
            computed = norms.norms(parts, self._collectives, self._buckets[0].device, norm_type)
            self._norms[norm_type] = dict(zip(self._slots, computed, strict=True))
        kept, buckets = self._norms[norm_type], (self._buckets[self._slots[name][0]] for name in names)
        return [kept[name].to(bucket.master_dtype) for name, bucket in zip(names, buckets, strict=True)]

    @torch.no_grad()
    def unscale(self, names: Sequence[str], found_inf: Tensor, inv_scale: Tensor) -> None:
        """Multiply gradients by `inv_scale`; `found_inf` becomes 1 on all ranks if one has found an infinity."""
        self._finish(names)
        self._norms.clear()
        parts = self._held(names)
        if parts:
            torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inv_scale)
        self._collectives.all_reduce(found_inf, dist.ReduceOp.MAX)


def _has_gradient(slot: Slot) -> bool:
    """Whether this rank has had a gradient of the parameter, or knows that another has."""
    gradient = slot.parameter.grad
    return gradient is not None and not (isinstance(gradient, PartitionedGradient) and gradient.tentative)


def _local_gradient(slot: Slot) -> Tensor | None:
    """What this rank alone has of a parameter's gradient: not in its bucket, nor in the segments."""
    gradient = slot.parameter.grad
    return gradient.pending if isinstance(gradient, PartitionedGradient) else gradient
