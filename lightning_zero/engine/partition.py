"""A module's trainable parameters, cut over the ranks: the engine as the strategy sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_zero.engine import norms
from lightning_zero.engine.arrivals import Arrivals
from lightning_zero.engine.buckets import ParameterBucket, Piece
from lightning_zero.engine.buffers import StateMemory
from lightning_zero.engine.collectives import Collectives
from lightning_zero.engine.cuts import Cut, cut_for
from lightning_zero.engine.gradients import GradientReducer
from lightning_zero.engine.optimizer import OwnedSegment, SegmentedOptimizer
from lightning_zero.engine.stand_in import PartitionedGradient
from lightning_zero.engine.states import copy_range
from lightning_zero.errors import UnsupportedModelError
from lightning_zero.segments import ParameterSpec, Policy, plan_buckets


class Partition:
    """Partitions the optimizer states of a module, and its gradients, over the ranks; in effect until `detach()`.

    Args:
        module: its parameters have the same values on every rank.
        optimizers: the user's; their param groups hold the module's parameters.
        collectives: the ranks.
        stage: 1: optimizer states are partitioned. 2: so are gradients while they accumulate.
        partition: `"element"`, `"parameter"` or `"auto"`.
        bucket_bytes: about how many bytes of parameters travel as one message.
        reduce_dtype: the dtype in which gradients travel; by default the parameters' own.
        find_unused_parameters: agree after each backward on the parameters that had a gradient, on NCCL too.
        before_change: called before masters or states change.
        state_bytes_to_load: of the whole states of each parameter, by name, that are going to be loaded: memory for
            this rank's is got ready (see `StateMemory`), and what isn't needed is let go by `release_state_memory()`.
        master_device: where masters and states are, and the optimizers step: see [Note: offloaded masters]. By default
            where the parameters are.

    Raises:
        UnsupportedModelError: an optimizer, or a way of sharing memory, that can't be partitioned.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Sequence[Optimizer],
        collectives: Collectives,
        *,
        stage: int,
        partition: Policy | Literal["auto"] = "auto",
        bucket_bytes: int,
        reduce_dtype: torch.dtype | None = None,
        find_unused_parameters: bool = False,
        before_change: Callable[[], None] = lambda: None,
        state_bytes_to_load: Mapping[str, int] | None = None,
        master_device: torch.device | None = None,
    ) -> None:
        self._master_device = master_device
        self._module = module
        self._collectives = collectives
        given = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        alone = collectives.world_size == 1 and all(_is_wide(parameter) for parameter in given)
        self._state_bytes_to_load = state_bytes_to_load or {}
        self._state_memory = StateMemory()
        self.cuts: list[Cut] = [cut_for(optimizer, partition, alone=alone) for optimizer in optimizers]
        """How each optimizer's parameters are cut, and why so."""
        # One rank has nothing to send: every parameter is a bucket of its own, whose memory is left as it is.
        self._bucket_bytes = bucket_bytes if collectives.world_size > 1 else 1
        self._optimizers = list(optimizers)
        self._by_parameter: dict[Parameter, ParameterBucket] = {}
        self.reducer = GradientReducer(
            collectives,
            stage=stage,
            reduce_dtype=reduce_dtype,
            find_unused_parameters=find_unused_parameters,
        )
        self.arrivals = Arrivals()
        self.segmented = [
            SegmentedOptimizer(optimizer, self.reducer, self.take_in_new_parameters, before_change, self.arrivals)
            for optimizer in optimizers
        ]
        """The optimizers, in the order in which they were given."""
        self._unowned = [p for p in module.parameters() if p.requires_grad]
        self.take_in_new_parameters()

    def take_in_new_parameters(self) -> None:
        """Partition the parameters of the optimizers' groups that aren't yet. No collective."""
        holders: dict[Parameter, list[int]] = {}
        for index, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    bucket = self._by_parameter.get(parameter)
                    if bucket is None:
                        holders.setdefault(parameter, []).append(index)
                    elif bucket not in self.segmented[index].buckets:
                        self._share(bucket, index)
        if not holders:
            return
        names = self._names(holders)
        # Backward reaches the last parameters first. What shares a bucket must share dtype, device and optimizers;
        # and a bucket of frozen parameters alone has nothing to send.
        alike: dict[tuple[Any, ...], list[Parameter]] = {}
        for parameter in reversed(names):
            key = (tuple(holders[parameter]), parameter.dtype, parameter.device, parameter.requires_grad)
            alike.setdefault(key, []).append(parameter)
        for (indices, *_), parameters in alike.items():
            self._add_buckets(indices, parameters, names)
        self._unowned = [parameter for parameter in self._unowned if parameter not in self._by_parameter]

    def _share(self, bucket: ParameterBucket, index: int) -> None:
        """Let a further optimizer step on a bucket that others step on already."""
        if self.cuts[index].policy == "parameter" and not bucket.whole:
            raise UnsupportedModelError(
                f"{type(self._optimizers[index]).__name__} needs whole parameters, and was given some that another "
                'optimizer has in parts; use ZeroStrategy(partition="parameter")'
            )
        self.segmented[index].add([bucket])

    def _names(self, parameters: Mapping[Parameter, Any]) -> dict[Parameter, str]:
        """The names of the given parameters, in the module's order; those of no module's get one of their own."""
        names = {parameter: name for name, parameter in self._module.named_parameters() if parameter in parameters}
        memory: dict[int, str] = {}
        for parameter in parameters:
            name = names.setdefault(parameter, f"<optimizer parameter {len(self._by_parameter) + len(names)}>")
            if parameter.is_complex() or not parameter.is_floating_point():
                raise UnsupportedModelError(
                    f"the parameter {name!r} is {parameter.dtype}; only real floating-point parameters can be trained "
                    "with ZeroStrategy. Use torch.view_as_real for a complex one"
                )
            if (
                self._collectives.world_size > 1
                and parameter.data_ptr()
                and memory.setdefault(parameter.data_ptr(), name) != name
            ):
                raise UnsupportedModelError(
                    f"the parameters {memory[parameter.data_ptr()]!r} and {name!r} share memory but are two objects; "
                    "tie them by assigning one Parameter to both modules"
                )
        for name, buffer in self._module.named_buffers():
            if buffer.numel() and buffer.data_ptr() in memory:
                raise UnsupportedModelError(
                    f"the buffer {name!r} is the memory of the parameter {memory[buffer.data_ptr()]!r}, which moves "
                    "into a bucket and would leave it behind; give it a copy, or use the parameter where it is used"
                )
        return names

    def _add_buckets(
        self, indices: tuple[int, ...], parameters: Sequence[Parameter], names: Mapping[Parameter, str]
    ) -> None:
        by_element = all(self.cuts[index].policy == "element" for index in indices)
        plans = plan_buckets(
            [ParameterSpec(names[p], tuple(p.shape), p.element_size()) for p in parameters],
            self._collectives.world_size,
            "element" if by_element else "parameter",
            self._bucket_bytes,
            equal_shards=self._collectives.equal_shards,
        )
        by_name = {names[parameter]: parameter for parameter in parameters}
        # An optimizer that brings states from an earlier fit gets them read into those
        brings_states = any(self._optimizers[index].state for index in indices)
        on_host = (self._master_device or parameters[0].device).type == "cpu"
        if self._state_bytes_to_load and on_host and not brings_states:
            owned = [segment for plan in plans for segment, _ in plan.owned(self._collectives.rank)]
            nbytes = self._state_bytes_to_load
            self._state_memory.expect(
                [(s.numel, nbytes.get(s.name, 0) * s.numel // by_name[s.name].numel()) for s in owned],
                [
                    parameter.numel * parameter.element_bytes
                    for plan in plans
                    if parameters[0].is_cpu and plan.numel > plan.parameters[0].numel
                    for parameter in plan.parameters
                ],
            )
        buckets = [
            ParameterBucket(
                plan,
                by_name,
                self._collectives,
                whole=not by_element,
                state_memory=self._state_memory,
                master_device=self._master_device,
            )
            for plan in plans
        ]
        for bucket in buckets:
            for slot in bucket.slots:
                self._by_parameter[slot.parameter] = bucket
        self.reducer.add(buckets)
        for index in indices:
            self.segmented[index].add(buckets)

    def detach(self) -> None:
        """Undo everything but the memory layout: hooks, stand-ins and wrapped methods. No collective."""
        self.reducer.detach()
        self.arrivals.detach()
        for segmented in self.segmented:
            segmented.drop_gradients()
            segmented.detach()
        self.release_state_memory()

    def come_to_rest(self) -> None:
        """The fit is over: see `ParameterBucket.come_to_rest`."""
        for bucket in self.buckets:
            bucket.come_to_rest()

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of an optimizer's state: see `SegmentedOptimizer.state_dict`."""
        return self._of(optimizer).state_dict()

    def whole_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state for whole parameters, as torch's own `state_dict()` has it. A collective."""
        segmented = self._of(optimizer)
        whole = segmented.state_dict()
        parameters = [p for group in segmented.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            state = self.full_state(parameter, segmented)
            del state["param"]
            if state:
                whole["state"][index] = state
        return whole

    def load_state(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Take this rank's part of an optimizer's whole state: see `SegmentedOptimizer.load_state`."""
        self._of(optimizer).load_state(state_dict, self._state_memory)

    def release_state_memory(self) -> None:
        """No states are going to be loaded any more."""
        self._state_bytes_to_load = {}
        self._state_memory.release()

    @torch.no_grad()
    def load_masters(self, state_dict: Mapping[str, Any], *, in_part: bool = False) -> None:
        """Take this rank's part of the masters that aren't views of their parameters from a module's state dict.

        Args:
            state_dict: the parameters have been loaded from it already, rounded to their own dtype.
            in_part: or some of them have, and others keep their masters, or take what was written into them.
        """
        self.take_in_new_parameters()  # as of layers that a resumed fit's callback has given an optimizer again
        for bucket in self.buckets:
            for piece in bucket.pieces:
                value, start, stop = state_dict.get(piece.slot.name), piece.segment.start, piece.segment.stop
                if not bucket.has_masters or not isinstance(value, Tensor):
                    continue
                if not in_part:
                    copy_range(value, start, stop, piece.master)
                elif value.shape == piece.slot.parameter.shape:
                    loaded = torch.empty_like(piece.master)
                    copy_range(value, start, stop, loaded)
                    held = piece.slot.parameter.detach().reshape(-1)[start:stop]
                    if torch.equal(loaded.view(-1).to(held.device, held.dtype), held):
                        piece.master.copy_(loaded)
        if in_part:
            self.take_over_outside_writes()

    @property
    def buckets(self) -> list[ParameterBucket]:
        """All buckets, each once."""
        return list(dict.fromkeys(self._by_parameter.values()))

    def flush(self) -> None:
        """A backward is over: send what it left. A collective."""
        for segmented in self.segmented:
            segmented.drop_gradients()
        self.reducer.flush()
        if self._collectives.world_size > 1 and self._unowned and self.reducer.is_syncing:
            self._average_unowned()

    @torch.no_grad()
    def _average_unowned(self) -> None:
        """Average the gradients of parameters that no optimizer holds, as DDP would: somebody may step on them by hand.

        They stay whole. One that has accumulated is the same on every rank but for its newest term, so that averaging
        all of it is right.
        """
        device = self._unowned[0].device
        held = self.reducer.agreed([parameter.grad is not None for parameter in self._unowned], device)
        for parameter, held_anywhere in zip(self._unowned, held, strict=True):
            if held_anywhere:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
                gradient /= self._collectives.world_size
                self._collectives.all_reduce(gradient, dist.ReduceOp.SUM)
                parameter.grad = gradient

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients without communication, at stage 1."""
        return self.reducer.no_sync()

    def overlap_gather(self) -> None:
        """Let a step's gather go on beside the next forward: see [Note: the gather beside the next forward]."""
        if self._collectives.world_size > 1:
            self.arrivals.watch(self._module, self._by_parameter.get)

    def take_over_outside_writes(self) -> None:
        """Bring what was written into parameters since the last step into the masters."""
        self.arrivals.wait()
        for segmented in self.segmented:
            segmented.take_over_outside_writes()

    @property
    def is_stepping(self) -> bool:
        """A step is under way, or was broken off: what the ranks hold may not belong together."""
        return any(segmented.is_stepping for segmented in self.segmented)

    def memory_bytes(self) -> dict[str, float]:
        """What this rank holds beside the parameters, in bytes and by kind."""
        states = [
            value
            for segmented in self.segmented
            for state in segmented.optimizer.state.values()
            for value in (state.values() if isinstance(state, dict) else ())
        ]
        whole = [
            p.grad for p in self._by_parameter if p.grad is not None and not isinstance(p.grad, PartitionedGradient)
        ]
        return {
            "masters": sum(bucket.master_bytes for bucket in self.buckets),
            "optimizer states": sum(value.nbytes for value in states if isinstance(value, Tensor)),
            "gradients": sum(bucket.gradient_bytes for bucket in self.buckets) + sum(g.nbytes for g in whole),
            "buckets": self.reducer.buffer_bytes,
        }

    def owned_bytes(self) -> tuple[int, int]:
        """The bytes of this rank's masters and of the optimizers' states, and in how many tensors they are."""
        tensors: list[Tensor] = [piece.master for bucket in self.buckets for piece in bucket.pieces]
        for segmented in self.segmented:
            for state in segmented.optimizer.state.values():
                if isinstance(state, dict):
                    tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors), len(tensors)

    def segments(self, optimizer: Optimizer) -> list[OwnedSegment]:
        """What this rank owns of an optimizer's parameters."""
        return self._of(optimizer).segments

    def gradients(self, optimizer: Optimizer | None = None) -> list[Tensor]:
        """The averaged gradients of this rank's segments, of one optimizer or of all. A collective."""
        of = self.segmented if optimizer is None else [self._of(optimizer)]
        # A parameter that two optimizers hold has one gradient.
        return list({piece: gradient for one in of for piece, gradient in one.gradients().items()}.values())

    def grad_norm(self, optimizer: Optimizer | None = None, norm_type: float = 2.0) -> Tensor:
        """The global gradient norm. A collective."""
        return self._norm(self.gradients(optimizer), norm_type)

    def _norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        first = next(iter(self._by_parameter), None)
        device = first.device if first is not None else torch.device("cpu")
        dtypes = {bucket.master_dtype for bucket in self.buckets}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        return norms.global_norm(gradients, self._collectives, device, dtype, norm_type)

    def clip_grad_norm_(self, max_norm: float, optimizer: Optimizer | None = None, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient by its global norm, which is given back. A collective."""
        gradients = self.gradients(optimizer)
        norm = self._norm(gradients, norm_type)
        self.reducer.forget_norms()
        norms.scale_to_norm_(gradients, norm, max_norm)
        return norm

    def clip_grad_value_(self, clip_value: float, optimizer: Optimizer | None = None) -> None:
        """Clamp the gradient's elements. A collective."""
        gradients = self.gradients(optimizer)
        self.reducer.forget_norms()
        norms.clip_values_(gradients, clip_value)

    def meet_again(self, collectives: Collectives) -> None:
        """After an exception, put parts together in groups in which nothing is under way. No gradient travels again."""
        self._collectives = collectives

    def full_state(self, parameter: Parameter, owner: SegmentedOptimizer | None = None) -> dict[str, Any]:
        """The whole fp32 parameter, as `"param"`, and its whole optimizer state. A collective.

        Args:
            parameter: one that an optimizer holds.
            owner: the optimizer whose state is meant; by default the first that holds the parameter.
        """
        bucket = self._bucket_of(parameter, "full_state")
        owner = owner or next(one for one in self.segmented if bucket in one.buckets)
        parts = self._parts(
            bucket, parameter, lambda piece: {"param": piece.master, **owner.optimizer.state.get(piece.master, {})}
        )
        whole: dict[str, Any] = {}
        for key, first in parts[0].items() if parts else ():
            if isinstance(first, Tensor) and first.shape == parts[0]["param"].shape:
                whole[key] = _joined([part[key] for part in parts], parameter)
            else:
                whole[key] = first
        return whole or {"param": parameter.detach().float()}

    def full_grad(self, parameter: Parameter) -> Tensor | None:
        """The whole averaged gradient of one parameter, None where it has none. A collective."""
        bucket = self._bucket_of(parameter, "full_grad")
        self.reducer.finish()
        gradient = parameter.grad
        if not isinstance(gradient, PartitionedGradient):
            return gradient
        parts = self._parts(bucket, parameter, lambda piece: {"grad": bucket.segment_gradient(piece)})
        return _joined([part["grad"] for part in parts], parameter) if parts else torch.zeros_like(parameter)

    def whole_gradients(self) -> dict[Parameter, Tensor]:
        """Every whole averaged gradient that there is. A collective."""
        whole = {parameter: self.full_grad(parameter) for parameter in self._by_parameter}
        return {
            parameter: gradient.to(parameter.dtype) for parameter, gradient in whole.items() if gradient is not None
        }

    def _bucket_of(self, parameter: Parameter, asked: str) -> ParameterBucket:
        bucket = self._by_parameter.get(parameter)
        if bucket is None:
            raise UnsupportedModelError(
                f"{asked} takes a parameter that an optimizer holds; any other is whole on every rank as it is"
            )
        return bucket

    def _parts(
        self, bucket: ParameterBucket, parameter: Parameter, of: Callable[[Piece], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What all ranks have of a parameter, in the order of its elements. A collective."""
        local = [
            (piece.segment.start, _copied(of(piece))) for piece in bucket.pieces if piece.slot.parameter is parameter
        ]
        gathered = [part for parts in self._collectives.all_gather_object(local) for part in parts]
        return [part for _, part in sorted(gathered, key=lambda part: part[0])]

    def _of(self, optimizer: Optimizer) -> SegmentedOptimizer:
        for segmented in self.segmented:
            # A LightningOptimizer holds the user's own in an attribute of that name.
            if segmented.optimizer in (optimizer, getattr(optimizer, "optimizer", None)):
                return segmented
        raise UnsupportedModelError(
            f"{type(optimizer).__name__} is none of the optimizers that configure_optimizers returned"
        )


def _is_wide(parameter: Tensor) -> bool:
    return torch.promote_types(parameter.dtype, torch.float32) == parameter.dtype


def _joined(parts: Sequence[Tensor], parameter: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]).view(parameter.shape).to(parameter.device)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copies on the CPU: a view would travel with the whole buffer that it is a view of."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in state.items()
    }
