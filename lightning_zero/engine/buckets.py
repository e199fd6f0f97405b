"""A bucket at run time: the parameters of one message, this rank's shard of them, and its masters.

[Note: masters]
The optimizer steps on *masters*: fp32 (or wider) tensors, one for each segment that this rank owns.

| the parameter is        | its master is                          | before a step        | after a step             |
|-------------------------|----------------------------------------|----------------------|--------------------------|
| fp32 or fp64, one rank  | the parameter itself                   | nothing to do        | nothing to do            |
| fp32 or fp64            | a view of the parameter's own memory   | nothing to do        | the shard is gathered    |
| the same, not contiguous| a view of the flat buffer              | copied from the      | the shard is gathered,   |
| or pointed elsewhere    |                                        | parameter            | copied to the parameter  |
| bf16 or fp16; or masters| a tensor of its own                    | elements that were   | rounded into the shard,  |
| are on another device   |                                        | written from outside | which is gathered        |
|                         |                                        | are taken over       |                          |

So what a user or a callback writes into a parameter (WGAN's clamping, pruning, averaging) is never undone by the
next step, whatever the parameter's dtype. "Written from outside" is seen in the values: an element that isn't its
master's rounding any more. (A version counter would miss what goes through `.data`.)

A parameter that somebody points at other memory stays there: that memory may be somebody's copy, as pruning's of the
first weights, and is trained under DDP too.

With one rank in fp32 the optimizer thus steps on the very parameters and gradients that it was made for: whatever
works without ZeRO (LBFGS, sparse gradients, state under keys of the optimizer's own) works.

[Note: offloaded masters]
Masters may be in host memory, and so are then the optimizer's states, which it makes where its parameters are; the step
is the host's work. Source: Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", 2021. What a step
moves over the bus is a rank's shard, thrice: the gradient down, the parameters' values down, to see what was written
from outside, and up again. All of it goes through pinned memory, and each copy is waited for. Until the step gradients
stay where the parameters are, and are clipped and unscaled there.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_zero.engine.buffers import StateMemory
from lightning_zero.engine.collectives import Collectives
from lightning_zero.engine.transport import Pending, Then, Works
from lightning_zero.errors import UnsupportedModelError
from lightning_zero.segments import Bucket, Segment


@dataclass(eq=False)
class Slot:
    """A parameter's place in its bucket."""

    name: str
    parameter: Parameter
    offset: int
    deposited: bool = False
    """This rank's gradient of the backward under way lies in the bucket's buffer."""
    continues: bool = False
    """That gradient adds to one that the segments hold already."""
    pointer: int = field(default=0, repr=False)
    """Where the parameter's memory is, if it is part of the bucket's flat buffer; else 0."""


@dataclass(eq=False)
class Piece:
    """A segment that this rank owns, with the tensor that the optimizer steps on."""

    slot: Slot
    segment: Segment
    offset: int
    """Where the segment begins in this rank's shard."""
    master: Parameter
    """A `Parameter`, since an optimizer may ask whether it requires a gradient."""
    place: Tensor
    """Where the master's memory belongs, whatever somebody has assigned to `master.data`."""


class ParameterBucket:
    """The parameters of one bucket, in one flat buffer that their memory is part of.

    Args:
        plan: what lies where, and who owns what.
        parameters: by name.
        collectives: the ranks that share the bucket.
        whole: give a master its parameter's shape, for an optimizer that looks at it, not a flat one.
        state_memory: takes the memory that the parameters leave.
        master_device: where the masters are; by default where the parameters are.
    """

    def __init__(
        self,
        plan: Bucket,
        parameters: Mapping[str, Parameter],
        collectives: Collectives,
        *,
        whole: bool,
        state_memory: StateMemory,
        master_device: torch.device | None = None,
    ) -> None:
        self.plan = plan
        self.whole = whole or collectives.world_size == 1
        self._collectives = collectives
        self.slots = [
            Slot(spec.name, parameters[spec.name], offset)
            for spec, offset in zip(plan.parameters, plan.offsets, strict=True)
        ]
        first = self.slots[0].parameter
        self.dtype, self.device = first.dtype, first.device
        self.master_dtype = torch.promote_types(self.dtype, torch.float32)
        self.is_offloaded = master_device not in (None, self.device)
        self._master_device = master_device or self.device
        self.has_masters = self.dtype != self.master_dtype or self.is_offloaded
        """Its masters have memory of their own, which no parameter has a part in."""
        self.is_own_master = collectives.world_size == 1 and not self.has_masters
        """The parameters are their masters; there is no buffer, nothing to copy and nothing to send."""
        self._gradient: Tensor | None = None
        self._gradient_on_host: Tensor | None = None
        self.at_rest = False
        """The fit is over: see `come_to_rest`."""
        self.pieces: list[Piece] = []
        if self.is_own_master:
            self.pieces += [
                Piece(slot, Segment(slot.name, 0, slot.parameter.numel()), 0, slot.parameter, slot.parameter.data)
                for slot in self.slots
            ]
            return
        self._flat = self._adopt_parameters(state_memory)
        self._masters = (
            self._room_like_masters(self.master_dtype).copy_(self._shard) if self.has_masters else self._shard
        )
        # The shard on the host, rounded already: so no more than that goes over the bus
        self._staged = self._room_like_masters(self.dtype) if self.is_offloaded else None
        low, _ = plan.shards.of(collectives.rank)
        slots = {slot.name: slot for slot in self.slots}
        for segment, offset in plan.owned(collectives.rank):
            slot = slots[segment.name]
            master = self._masters[offset - low : offset - low + segment.numel]
            if whole and slot.parameter.dim() > 0:
                master = master.view(slot.parameter.shape)
            self.pieces.append(Piece(slot, segment, offset - low, Parameter(master), master))

    @property
    def _shard(self) -> Tensor:
        start, stop = self.plan.shards.of(self._collectives.rank)
        return self._flat[start:stop]

    def _adopt_parameters(self, state_memory: StateMemory) -> Tensor:
        """Make the parameters' memory part of one flat buffer; one that fills the bucket alone is it already."""
        only = self.slots[0].parameter.data
        if len(self.slots) == 1 and only.is_contiguous() and only.numel() == self.plan.numel:
            self.slots[0].pointer = only.data_ptr()
            return only.view(-1)
        del only  # nobody else is to see what it leaves
        self._flat = torch.zeros(self.plan.numel, dtype=self.dtype, device=self.device)
        for slot in self.slots:
            left = slot.parameter.data
            self._adopt(slot)
            if slot.pointer:
                state_memory.keep(left)
        return self._flat

    def _region(self, slot: Slot) -> Tensor:
        return self._flat[slot.offset : slot.offset + slot.parameter.numel()].view(slot.parameter.shape)

    def _adopt(self, slot: Slot) -> None:
        parameter, region = slot.parameter, self._region(slot)
        region.copy_(parameter.data)
        if parameter.data.is_contiguous():
            parameter.data = region
            slot.pointer = region.data_ptr()
        else:
            slot.pointer = 0

    def _room_like_masters(self, dtype: torch.dtype) -> Tensor:
        pinned = self.is_offloaded and self.device.type == "cuda"
        return torch.empty(self._shard.numel(), dtype=dtype, device=self._master_device, pin_memory=pinned)

    @property
    def is_idle(self) -> bool:
        """No parameter here can have a gradient, as those of a frozen backbone: no step changes anything."""
        return all(not slot.parameter.requires_grad and slot.parameter.grad is None for slot in self.slots)

    @property
    def gradient(self) -> Tensor:
        """This rank's shard of the averaged gradient; its memory is first touched when a gradient arrives."""
        if self._gradient is None:
            self._gradient = torch.empty(self._masters.numel(), dtype=self.master_dtype, device=self.device)
        return self._gradient

    def release_gradient(self) -> None:
        """Let go of the shard's memory: nothing in it is needed any more."""
        self._gradient = None

    @property
    def gradient_bytes(self) -> int:
        """Of this rank's shard of the gradient, if there has been one."""
        return 0 if self._gradient is None else self._gradient.nbytes

    @property
    def master_bytes(self) -> int:
        """Of the masters, where they are no part of the parameters."""
        return sum(piece.master.nbytes for piece in self.pieces) if self.has_masters else 0

    def segment_gradient(self, piece: Piece) -> Tensor | None:
        """The averaged gradient of a segment, in its master's shape and dtype; None where there is none."""
        whole = piece.slot.parameter.grad
        if whole is None:
            return None
        if self._collectives.world_size > 1:
            flat = self.gradient[piece.offset : piece.offset + piece.segment.numel]
        else:
            flat = whole.to_dense().reshape(-1) if whole.is_sparse else whole.reshape(-1)
        return flat.view(piece.master.shape).to(self.master_dtype)

    def master_gradient(self, piece: Piece) -> Tensor | None:
        """The same where the master is, for the optimizer's step."""
        gradient = self.segment_gradient(piece)
        if gradient is None or not self.is_offloaded:
            return gradient
        if self._gradient_on_host is None:
            self._gradient_on_host = self._room_like_masters(self.master_dtype)
        part = self._gradient_on_host[piece.offset : piece.offset + piece.segment.numel]
        return part.view(piece.master.shape).copy_(gradient)

    @property
    def storage(self) -> int:
        """Where the flat buffer is; 0 where there is none any more."""
        return self._flat.untyped_storage().data_ptr()

    def part_from_others(self, storages: Container[int]) -> None:
        """Give a parameter that was pointed at memory of a flat buffer a copy: it is another parameter's.

        To be done for all buckets before any of them takes over what was written outside.
        """
        for slot in self.slots:
            data = slot.parameter.data
            if data.data_ptr() != slot.pointer and data.untyped_storage().data_ptr() in storages:
                slot.parameter.data = data.clone()

    @torch.no_grad()
    def take_over_outside_writes(self) -> None:
        """Bring what was written into the parameters since the last step into the masters."""
        if self.at_rest:
            self.come_to_rest()
            return
        for slot, spec in zip(self.slots, self.plan.parameters, strict=True):
            parameter = slot.parameter
            if parameter.shape != spec.shape:
                raise UnsupportedModelError(
                    f"the parameter {slot.name!r} changed its shape to {tuple(parameter.shape)} during training; "
                    "give the optimizer a new parameter by add_param_group instead"
                )
            if parameter.numel() and not self._is_part(slot):
                if slot.pointer:
                    self._leave_buffer(slot)
                self._region(slot).copy_(parameter)
        if self.has_masters:
            shard = self._shard if self._staged is None else self._staged.copy_(self._shard)
            outside = self._masters.to(self.dtype) != shard
            if not shard.is_cpu or outside.any():  # the host would stop for a device's answer
                torch.where(outside, shard.to(self.master_dtype), self._masters, out=self._masters)

    def _is_part(self, slot: Slot) -> bool:
        """Whether the parameter's memory is its region of the flat buffer."""
        return slot.parameter.data_ptr() == slot.pointer and slot.parameter.is_contiguous()

    def _leave_buffer(self, gone: Slot) -> None:
        """Go on in another flat buffer: a parameter was pointed away from this one, which somebody may have kept."""
        if gone.parameter.data_ptr() == gone.pointer:  # the same memory, transposed
            gone.parameter.data = gone.parameter.data.clone()
        gone.pointer = 0
        before, self._flat = self._flat, self._flat.clone()
        low, _ = self.plan.shards.of(self._collectives.rank)
        for slot in self.slots:
            if slot.pointer and slot.parameter.data_ptr() == slot.pointer:
                slot.parameter.data = self._region(slot)
                slot.pointer = slot.parameter.data_ptr()
        if self._masters.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
            self._masters = self._shard
            for piece in self.pieces:
                part = self._flat[low + piece.offset : low + piece.offset + piece.segment.numel]
                piece.place = part.view(piece.master.shape)
                piece.master.data = piece.place

    @torch.no_grad()
    def put_masters_back(self) -> None:
        """Bring masters that an optimizer has pointed at other memory back to their place."""
        for piece in self.pieces:
            if piece.master.data_ptr() != piece.place.data_ptr():
                piece.place.copy_(piece.master.data)
                piece.master.data = piece.place

    @torch.no_grad()
    def publish(self) -> Pending:
        """Give every rank what this rank's masters have become; the parameters stand when it is waited for."""
        if self.has_masters:
            self._shard.copy_(self._masters if self._staged is None else self._staged.copy_(self._masters))
        alone = self._collectives.world_size == 1
        gathered = Works(()) if alone else self._collectives.all_gather(self._flat, self.plan.shards)
        return Then(gathered, self.copy_out)

    @torch.no_grad()
    def copy_out(self) -> None:
        """Bring the flat buffer's values to the parameters that are not views of it."""
        for slot in self.slots:
            if slot.parameter.numel() and not slot.pointer:
                slot.parameter.copy_(self._region(slot))

    @torch.no_grad()
    def come_to_rest(self) -> None:
        """The fit is over: each parameter has memory of its own again, and its masters follow it; no buffer is left.

        So whatever is saved of a part of the module is as large as that part. Lightning may have moved the module to
        another device, which is followed as often as this is called. What is saved after the fit is the masters'.
        """
        begins, self.at_rest, self._gradient, self._gradient_on_host = not self.at_rest, True, None, None
        if self.is_own_master:
            return
        if begins:
            for slot in self.slots:
                if self._is_part(slot) and len(self.slots) > 1:
                    slot.parameter.data = slot.parameter.data.clone()
            self._flat = self._flat.new_empty(0)
            self._masters = self._masters.new_empty(0)
            self._staged = None
        for piece in self.pieces:
            parameter, segment = piece.slot.parameter.data, piece.segment
            part = parameter.reshape(-1)[segment.start : segment.stop].view(piece.master.shape)
            if self.dtype == self.master_dtype:
                piece.place = part
            else:
                piece.place = piece.master.data.to(parameter.device)
                outside = piece.place.to(self.dtype) != part
                piece.place[outside] = part[outside].to(self.master_dtype)
            piece.master.data = piece.place
