"""An optimizer's states on their way from a whole parameter to the piece of it that a rank owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_zero.engine.buckets import Piece
from lightning_zero.engine.buffers import StateMemory
from lightning_zero.errors import CheckpointMismatchError, UnsupportedModelError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a state, which may be a container of them, as SOAP's are."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def require_cuttable(value: Any, key: str, piece: Piece, optimizer: Optimizer) -> None:
    """Make sure that a part of a whole parameter's state can be told.

    Raises:
        CheckpointMismatchError: only a part of the parameter is owned, and a tensor of the state has another shape.
    """
    shape, in_part = piece.slot.parameter.shape, piece.segment.numel != piece.slot.parameter.numel()
    for tensor in tensors_in(value) if in_part else ():
        if tensor.numel() > 1 and tensor.shape != shape:
            raise CheckpointMismatchError(
                f"{type(optimizer).__name__}'s state {key!r} of {piece.slot.name!r} has the shape "
                f"{tuple(tensor.shape)}, not the parameter's {tuple(shape)}, and can't be cut; use "
                'ZeroStrategy(partition="parameter")'
            )


def part_of(value: Any, key: str, piece: Piece, room: Callable[..., Tensor]) -> Any:
    """What belongs to a piece of a parameter, of one state of the whole.

    Args:
        value: the state: a tensor, perhaps one that is still in a checkpoint, or a container.
        key: its name.
        piece: whose part is meant.
        room: gives the tensor that an element-wise one is copied into, like a given one, of a `dtype`.
    """
    if isinstance(value, Tensor):  # as most are: to walk through a tree takes as long as all else
        return _part_of_leaf(value, key, piece, room)
    return tree_map(lambda leaf: _part_of_leaf(leaf, key, piece, room), value)


def _part_of_leaf(value: Any, key: str, piece: Piece, room: Callable[..., Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    shape, master = piece.slot.parameter.shape, piece.master.detach()
    if value.shape == shape and not (value.dim() == 0 and key == "step"):
        still_in_checkpoint = hasattr(value, "read_range")  # and so of the dtype that the optimizer chose
        dtype = value.dtype if still_in_checkpoint or not value.is_floating_point() else master.dtype
        part = room(master, dtype=dtype)
        copy_range(value, piece.segment.start, piece.segment.stop, part)
        return part
    return value.clone() if key == "step" and not master.is_cpu else value.to(master.device, copy=True)


def room_for(held: Any, memory: StateMemory, like: Tensor, *, dtype: torch.dtype) -> Tensor:
    """A tensor to read into: the one that is held, if it fits; else one from `memory`."""
    wanted = (like.shape, dtype, like.device)
    fits = isinstance(held, Tensor) and held.is_contiguous() and (held.shape, held.dtype, held.device) == wanted
    return cast("Tensor", held) if fits else memory.empty(*wanted)


def copy_range(source: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Copy elements `[start, stop)` of a flattened tensor into `out`; one that is still on disk reads just those."""
    read_range = getattr(source, "read_range", None)
    if read_range is not None:
        read_range(start, stop, out.view(-1))
    else:
        out.view(-1).copy_(source.reshape(-1)[start:stop])


def taken_over(state: Mapping[str, Any], former: Piece, piece: Piece, optimizer: Optimizer) -> dict[str, Any]:
    """The state that an earlier fit has left of the same piece, where the piece is now.

    Raises:
        UnsupportedModelError: it was another piece of the parameter.
    """
    if (former.segment.start, former.segment.stop) != (piece.segment.start, piece.segment.stop):
        raise UnsupportedModelError(
            f"the {type(optimizer).__name__} of an earlier fit was cut in another way than it would be now; make a new "
            "optimizer in configure_optimizers, and resume from a checkpoint"
        )
    device = piece.master.device  # Lightning has brought it all to the accelerator
    return {
        key: value.to(device) if isinstance(value, Tensor) and (value.dim() or device.type == "cpu") else value
        for key, value in state.items()
    }
