"""What another system has written, written again as one of our tags: bit for bit, a rank after the other.

Each rank's shard holds what that rank's files held, so nothing is joined and nothing is cut: its tensors go from one
file to the other through a buffer of a few megabytes, and the tag appears by the commit of every save. The source is
never written to, and a tag that is there is never replaced. Nothing that a file says is executed, here; what would be
when `trainer.pt` is loaded is refused.

| what | where it goes |
|---|---|
| masters, frozen parameters, buffers | the shards |
| the optimizers' states, a step as torch's own optimizers keep it | the shards |
| param groups with their settings | `trainer.pt` |
| Lightning's dict | `trainer.pt`, whose own it is |
| where there is none: the count of steps, the schedulers' states, the client state | `trainer.pt` |
"""

from __future__ import annotations

from collections.abc import Iterator
from pickle import PicklingError
from typing import Any

import torch

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.content import CLIENT_STATE, RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.foreign import LIGHTNING_VERSION, ForeignCheckpoint, Piece, Rank
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, MASTER_CODES, TRAINER_NAME, OptimizerEntry, StoredValue
from lightning_zero.checkpoint.origins import origins_beside
from lightning_zero.checkpoint.plain_loops import loops_after
from lightning_zero.checkpoint.report import SaveReport
from lightning_zero.checkpoint.save import save_for_ranks
from lightning_zero.checkpoint.storage import Location, absolute
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.checkpoint.torch_file import read_torch_file, torch_file_bytes
from lightning_zero.errors import CheckpointWriteError, CorruptCheckpointError

_OLDEST_LIGHTNING = "2.5.0"
"""Of the dict that is made up for a run that knew no Lightning: later releases bring it up to date."""


def write_imported(
    checkpoint: ForeignCheckpoint, save_dir: Location, *, weights_only: bool = True, verify: bool = True
) -> SaveReport:
    """Write what was read.

    Args:
        checkpoint: what was read.
        save_dir: where the tag is written; `latest` names it then.
        weights_only: refuse what would run code when the tag is loaded.
        verify: compare the source with its own checksums first, a rank after the other.

    Raises:
        CheckpointWriteError: the tag can't be written, or is there already; what was there is there.
        CorruptCheckpointError: a checksum doesn't match.
        UntrustedContentError: there is something in it that would run code.
    """
    directory = absolute(save_dir) / checkpoint.name
    for there, origin in origins_beside(directory):
        raise CheckpointWriteError(
            f"{directory.parent} holds {there.name!r}, a checkpoint of {origin.writer}'s, which stays as it is; "
            "import into another directory"
        )
    if checkpoint.directory in directory.parents:
        raise CheckpointWriteError(f"{directory} is within {checkpoint.directory}, which stays as it is")
    commit.require_replaceable(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise CheckpointWriteError(
            f"{directory} is a checkpoint already, which was left as it is; import into another directory, or remove "
            "it. Import once, and not in a script that every rank runs"
        )
    trainer = _trainer_bytes(checkpoint, weights_only)
    step, epoch = _progress_of(checkpoint)
    shared = SharedContent(
        epoch,
        checkpoint.stage,
        checkpoint.entries,
        checkpoint.aliases,
        [
            OptimizerEntry(optimizer.class_name, tuple(group.names for group in optimizer.groups))
            for optimizer in checkpoint.optimizers
        ],
        trainer,
    )

    def contents() -> Iterator[RankContent]:
        for rank in checkpoint.ranks:
            if verify:
                for record in sorted(rank.records, key=lambda record: (str(record.path), record.place.offset)):
                    record.verify()
            yield _content(rank, step)

    return save_for_ranks(directory, contents(), shared, world_size=len(checkpoint.ranks))


def _content(rank: Rank, step: int) -> RankContent:
    values = [
        StoredValue(
            piece.optimizer, piece.segment.name, piece.segment.start, piece.segment.stop, piece.state, piece.value
        )
        for piece in rank.trained
        if piece.state not in (None, "step") and not isinstance(piece.value, Elements)
    ]
    trained = [_tensor(piece) for piece in rank.trained if isinstance(piece.value, Elements) or piece.state == "step"]
    return RankContent([*trained, *map(_given, rank.others)], values, b"", step, [*map(_given, rank.frozen)])


def _tensor(piece: Piece) -> TensorToSave:
    name, start, stop = piece.segment.name, piece.segment.start, piece.segment.stop
    if piece.state is not None:
        # A step that is a number becomes a tensor: torch's own optimizers keep it so
        held = LazyTensor(piece.value) if isinstance(piece.value, Elements) else torch.tensor(piece.value)
        return TensorToSave("optimizer", name, start, stop, held, piece.optimizer, piece.state)
    # Masters may be narrower there; ours never are
    assert isinstance(piece.value, Elements)
    return _given(piece if piece.value.stored in MASTER_CODES else piece.widened())


def _given(piece: Piece) -> TensorToSave:
    """A tensor of the module, as it is."""
    assert isinstance(piece.value, Elements)
    return TensorToSave("model", piece.segment.name, piece.segment.start, piece.segment.stop, LazyTensor(piece.value))


# -------------------------------------------------------------------------------------------------- trainer.pt


def _trainer_bytes(checkpoint: ForeignCheckpoint, weights_only: bool) -> bytes:
    """The content of `trainer.pt`, which loads."""
    where = f"{checkpoint.directory}: the client state"
    try:
        content = torch_file_bytes(_trainer(checkpoint), TRAINER_NAME)
    except (PicklingError, TypeError) as error:
        raise CorruptCheckpointError(f"{where} can't be written again: {error}") from error
    read_torch_file(content, where, weights_only=weights_only)
    return content


def _trainer(checkpoint: ForeignCheckpoint) -> dict[Any, Any]:
    """Lightning's dict without its tensors, in the terms of `pickled`."""
    if checkpoint.is_lightnings:
        trainer = dict(checkpoint.client_state)
    else:
        trainer = {
            "epoch": 0,
            "global_step": checkpoint.step,
            LIGHTNING_VERSION: _OLDEST_LIGHTNING,
            "loops": loops_after(checkpoint.step),
            "callbacks": {},
            "lr_schedulers": checkpoint.schedulers,
            CLIENT_STATE: checkpoint.client_state,
        }
    trainer["state_dict"] = checkpoint.odd
    trainer["optimizer_states"] = []
    for optimizer in checkpoint.optimizers:
        numbers = iter(range(sum(len(group.names) for group in optimizer.groups)))
        groups = [{**group.settings, "params": [next(numbers) for _ in group.names]} for group in optimizer.groups]
        trainer["optimizer_states"].append({"state": {}, "param_groups": groups})
    return trainer


def _progress_of(checkpoint: ForeignCheckpoint) -> tuple[int, int]:
    """The step and the epoch that training goes on from."""
    if not checkpoint.is_lightnings:
        return checkpoint.step, 0
    step, epoch = (checkpoint.client_state.get(key) for key in ("global_step", "epoch"))
    if type(step) is not int or type(epoch) is not int or step < 0 or epoch < 0:
        raise CorruptCheckpointError(
            f"{checkpoint.directory}: Lightning's step is {step!r:.40}, its epoch {epoch!r:.40}"
        )
    return step, epoch
