"""Gradients on their way from backward to the segments.

[Note: the way of a gradient]
Backward accumulates a parameter's gradient; a hook moves it into its bucket's buffer, divided by the number of
ranks, and frees it. A full bucket is reduce-scattered while backward goes on: always in the order of the buckets,
so that all ranks issue the same collectives. When backward is over, `flush` sends what is left, and `finish`
waits: each rank's shard of the averaged gradient stands. A second backward adds to the shards.

From then on `parameter.grad` is a *stand-in*: it has the shape and takes no memory, and being there says that the
segments hold a gradient. So whatever drops or zeroes gradients (`optimizer.zero_grad()`, `module.zero_grad()`,
`parameter.grad = None`) does what it says, and whoever wants to compute with a gradient that isn't there gets an
error with a way out, never a silent nothing.

| `parameter.grad` before backward | what the new gradient does to the segments |
|----------------------------------|--------------------------------------------|
| None                             | replaces what they hold                    |
| a tensor (stage 1, accumulating) | goes there as it is, with what it has      |
| the stand-in                     | adds to what they hold                     |

At stage 1 under `no_sync` a gradient stays whole in `parameter.grad` (or with the stand-in) and is reduced once.
With one rank no gradient moves anywhere: the segments' gradients are views of `parameter.grad`.

Which parameters had a gradient on *any* rank is agreed on at each flush where that is cheap or asked for
(`find_unused_parameters`): a parameter without one on every rank must keep `None`, or AdamW would decay it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_zero.engine.buckets import ParameterBucket, Slot
from lightning_zero.engine.buffers import BufferPool
from lightning_zero.engine.collectives import Collectives, Pending
from lightning_zero.errors import UnsupportedModelError

_IN_FLIGHT = 2
"""Buckets whose reduction may be under way; one more waits for the oldest, which bounds the memory."""


class PartitionedGradient(torch.Tensor):
    """The stand-in of [Note: the way of a gradient]."""

    pending: Tensor | None
    """What backward has accumulated onto the stand-in, and its bucket has not taken yet."""

    _name: str
    _reducer: GradientReducer

    @staticmethod
    def of(slot: Slot, reducer: GradientReducer) -> PartitionedGradient:
        """The stand-in for one parameter's gradient."""
        parameter = slot.parameter
        gradient: PartitionedGradient = torch.Tensor._make_wrapper_subclass(
            PartitionedGradient,
            parameter.shape,
            dtype=parameter.dtype,
            device=parameter.device,
            strides=parameter.stride(),
        )
        gradient.pending, gradient._name, gradient._reducer = None, slot.name, reducer
        return gradient

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self = args[0]
        if func is torch.ops.aten.add_.Tensor and isinstance(self, cls):
            self.pending = args[1] if self.pending is None else self.pending + args[1]
            return self
        if func is torch.ops.aten.zero_.default:
            self._zero()
            return self
        if func is torch.ops.aten._foreach_zero_.default:
            for gradient in self:
                gradient._zero() if isinstance(gradient, cls) else gradient.zero_()
            return None
        if func in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default):
            return self
        names = [tensor._name for tensor in _flatten(args) if isinstance(tensor, cls)]
        raise UnsupportedModelError(
            f"the gradient of {names[0]!r} is partitioned over the ranks; no rank holds it whole ({func}). "
            "Clip with Trainer(gradient_clip_val=...), self.clip_gradients(optimizer, ...) or "
            "self.trainer.strategy.clip_grad_norm_(max_norm); self.trainer.strategy.grad_norm() is the global norm; "
            "strategy.segments(optimizer) gives what this rank owns"
        )

    def _zero(self) -> None:
        self.pending = None
        self._reducer.zero(self._name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartitionedGradient({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _flatten(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flatten(value)
        else:
            yield value


class GradientReducer:
    """Averages gradients over the ranks, each rank keeping its shards.

    Args:
        buckets: in the order in which backward is expected to fill them.
        collectives: the ranks.
        stage: 1: gradients accumulate whole under `no_sync`. 2: they are reduced after every backward.
        reduce_dtype: what travels; the parameter's own dtype by default.
        find_unused_parameters: agree after each backward on which parameters had a gradient anywhere.
    """

    def __init__(
        self,
        buckets: Sequence[ParameterBucket],
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
        self._sync = True
        self._pool = BufferPool()
        self._buckets: list[ParameterBucket] = []
        self._slots: dict[str, tuple[ParameterBucket, Slot]] = {}
        self._stand_ins: dict[str, PartitionedGradient] = {}
        self._hooks: list[RemovableHandle] = []
        self._in_flight: list[tuple[Pending, Tensor]] = []
        self._buffers: dict[int, Tensor] = {}
        # Of the backward under way:
        self._arrived: set[str] = set()
        self._missing: list[int] = []
        self._next = 0
        self.add(buckets)

    def add(self, buckets: Sequence[ParameterBucket]) -> None:
        """Take further buckets in, behind those that are there."""
        first = len(self._buckets)
        self._buckets += buckets
        if self._collectives.world_size == 1:
            return
        for index, bucket in enumerate(buckets, first):
            for slot in bucket.slots:
                self._slots[slot.name] = (bucket, slot)
                self._stand_ins[slot.name] = PartitionedGradient.of(slot, self)
                self._hooks.append(self._hook(index, slot))

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

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """At stage 1, let gradients accumulate without communication; at stage 2 they are reduced all the same."""
        before, self._sync = self._sync, self._stage > 1
        try:
            yield
        finally:
            self._sync = before

    def _on_gradient(self, index: int, slot: Slot) -> None:
        if not self._sync:
            return
        if slot.name in self._arrived:
            self.flush()  # a second backward has begun, and nobody has told us of the first one's end
        if not self._arrived:
            self._next = 0
            self._missing = [sum(slot.parameter.requires_grad for slot in bucket.slots) for bucket in self._buckets]
        self._deposit(index, slot)
        self._missing[index] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] <= 0:
            if self._next in self._buffers:
                self._launch(self._next)
            self._next += 1

    @torch.no_grad()
    def _deposit(self, index: int, slot: Slot) -> None:
        """Move a gradient from its parameter into the bucket's buffer; the parameter keeps the stand-in."""
        bucket, gradient = self._buckets[index], slot.parameter.grad
        slot.continues = isinstance(gradient, PartitionedGradient)
        if isinstance(gradient, PartitionedGradient):
            stand_in, gradient = gradient, gradient.pending
            stand_in.pending = None
        if gradient is None:
            return
        slot.parameter.grad = self._stand_ins[slot.name]
        slot.deposited = True
        self._arrived.add(slot.name)
        dtype = self._reduce_dtype or bucket.dtype
        share = 1.0 / self._collectives.world_size
        flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        if not slot.continues and flat.numel() == bucket.plan.numel and flat.dtype == dtype:
            # It fills the bucket alone: its own memory is the buffer. (What came onto a stand-in may be shared.)
            self._buffers[index] = flat.mul_(share)
            return
        region = self._buffer(index)[slot.offset : slot.offset + flat.numel()]
        if flat.dtype == dtype:
            torch.mul(flat, share, out=region)
        else:
            region.copy_(flat).mul_(share)

    def _buffer(self, index: int) -> Tensor:
        if index not in self._buffers:
            self._wait(keep=_IN_FLIGHT - 1)
            bucket = self._buckets[index]
            self._buffers[index] = self._pool.take(bucket.plan.numel, self._reduce_dtype or bucket.dtype, bucket.device)
        return self._buffers[index]

    @torch.no_grad()
    def _launch(self, index: int) -> None:
        bucket, buffer = self._buckets[index], self._buffer(index)
        del self._buffers[index]
        for slot in bucket.slots:
            if not slot.deposited:
                buffer[slot.offset : slot.offset + slot.parameter.numel()].zero_()
                slot.continues = isinstance(slot.parameter.grad, PartitionedGradient)
            slot.deposited = False
        fresh = [piece for piece in bucket.pieces if not piece.slot.continues]
        accumulate = len(fresh) < len(bucket.pieces)
        if accumulate:
            for piece in fresh:
                bucket.gradient[piece.offset : piece.offset + piece.segment.numel].zero_()
        self._wait(keep=_IN_FLIGHT - 1)
        pending = self._collectives.reduce_scatter(buffer, bucket.plan.bounds, bucket.gradient, accumulate=accumulate)
        self._in_flight.append((pending, buffer))

    def _wait(self, keep: int) -> None:
        """Wait for the oldest reductions until at most `keep` are under way."""
        while len(self._in_flight) > keep:
            pending, buffer = self._in_flight.pop(0)
            with torch.no_grad():
                pending.wait()
            self._pool.give_back(buffer)

    def flush(self) -> None:
        """Send what the last backward left: buckets that lack a gradient, and gradients that came without a hook.

        A collective: every rank calls it at the same points, as it does all that leads to it.
        """
        if self._sync and self._collectives.world_size > 1:
            self._flush()

    def finish(self) -> None:
        """Return when every gradient that was accumulated so far stands in its segments."""
        if self._collectives.world_size > 1:
            self._flush()
            self._wait(keep=0)

    def _flush(self) -> None:
        for index, bucket in enumerate(self._buckets):
            for slot in bucket.slots:
                gradient = slot.parameter.grad
                if isinstance(gradient, PartitionedGradient):
                    gradient = gradient.pending
                if gradient is not None:
                    self._deposit(index, slot)
        arrived = self._arrived_anywhere()
        for index, bucket in enumerate(self._buckets):
            sent = not any(slot.deposited for slot in bucket.slots) and any(
                slot.name in self._arrived for slot in bucket.slots
            )
            if not sent and any(slot.name in arrived for slot in bucket.slots):
                self._launch(index)
        for name in arrived:
            self._slots[name][1].parameter.grad = self._stand_ins[name]
        self._arrived.clear()

    def _arrived_anywhere(self) -> set[str]:
        """The parameters that had a gradient on any rank, as far as the ranks are to agree on it."""
        if not self._agree or not self._slots:
            return set(self._arrived)
        flags = torch.tensor([name in self._arrived for name in self._slots], dtype=torch.uint8)
        flags = flags.to(self._buckets[0].device)
        self._collectives.all_reduce(flags, dist.ReduceOp.MAX)
        return {name for name, flag in zip(self._slots, flags.tolist(), strict=True) if flag}

    def zero(self, name: str) -> None:
        """Set what the segments hold of one parameter's gradient to zero."""
        self._wait(keep=0)
        bucket, slot = self._slots[name]
        for piece in bucket.pieces:
            if piece.slot is slot:
                bucket.gradient[piece.offset : piece.offset + piece.segment.numel].zero_()
