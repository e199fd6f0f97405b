"""What is put into a checkpoint: the segments and states of one rank, and what all ranks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_zero.checkpoint.manifest import Entry, Kind, OptimizerEntry, StoredValue

CLIENT_STATE = "lightning_zero_client_state"
"""Where Lightning's dict has what `save_zero_checkpoint` was given to keep."""


class TensorToSave(NamedTuple):
    """A tensor on its way into a checkpoint: `StoredTensor` says what the fields mean. A tuple, since there are many.

    `tensor` is 1-D where it has one element for each of the segment's, and of any shape where it is whole. It is
    `steady` if nothing but a step of the optimizer changes it: a forward may change buffers, and a callback that swaps
    in averaged weights, or a teacher's, the parameters themselves.
    """

    kind: Kind
    name: str
    start: int
    stop: int
    tensor: Tensor
    optimizer: int | None = None
    state: str | None = None
    steady: bool = False


@dataclass(frozen=True, slots=True)
class RankContent:
    """What one rank puts into a checkpoint.

    Attributes:
        tensors: its segments, and their optimizer states.
        values: the optimizer states that are no tensors.
        rank_state: what this rank alone needs to go on (the state of its random numbers); given back as it is.
        step: of training, as this rank sees it.
        unchanging: its part of the parameters that aren't trained at present: what an earlier save has written may
            stand for it.
    """

    tensors: Sequence[TensorToSave]
    values: Sequence[StoredValue]
    rank_state: bytes
    step: int
    unchanging: Sequence[TensorToSave] = ()


@dataclass(frozen=True, slots=True)
class SharedContent:
    """What the ranks have in common; only rank 0's is looked at.

    Attributes:
        epoch: of training.
        stage: of ZeRO.
        entries: the module's state dict, in its order; then the tensors from elsewhere: see `placeholders`.
        aliases: tied tensors: the other name, to the name under which it is stored.
        optimizers: in the trainer's order.
        trainer: everything else, for `trainer.pt`; or what that file is to hold, byte for byte.
    """

    epoch: int
    stage: int
    entries: Sequence[Entry]
    aliases: Mapping[str, str]
    optimizers: Sequence[OptimizerEntry]
    trainer: dict[str, Any] | bytes
