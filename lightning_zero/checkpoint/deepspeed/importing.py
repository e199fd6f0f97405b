"""A DeepSpeed checkpoint, written again as one of our tags: bit for bit, a rank after the other.

Each rank's shard holds what that rank's files held, so nothing is joined and nothing is cut: its tensors go from one
file to the other through a buffer of a few megabytes, and the tag appears by the commit of every save. Nothing that a
file says is executed, here; what would be when `trainer.pt` is loaded is refused.

| what | where it goes |
|---|---|
| masters, frozen parameters, buffers | the shards |
| the optimizer's states, its step as torch's own optimizers keep it | the shards |
| param groups with their settings | `trainer.pt` |
| Lightning's dict | `trainer.pt`, whose own it is |
| of a plain DeepSpeed run: the count of its steps, the scheduler's state, the client state | `trainer.pt` |
| the loss scale, the data sampler, DeepSpeed's configuration | nowhere |
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pickle import PicklingError
from typing import Any

import torch

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.content import CLIENT_STATE, RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.deepspeed.directory import LIGHTNING_TAG, DeepSpeedCheckpoint, Rank, read_deepspeed
from lightning_zero.checkpoint.deepspeed.files import Progress, find_deepspeed_tag, is_deepspeed_tag
from lightning_zero.checkpoint.deepspeed.flat_groups import Piece
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, MASTER_CODES, TRAINER_NAME, OptimizerEntry, StoredValue
from lightning_zero.checkpoint.plain_loops import loops_after
from lightning_zero.checkpoint.report import SaveReport
from lightning_zero.checkpoint.save import save_for_ranks
from lightning_zero.checkpoint.storage import Location, PathOrUrl, absolute, locate, names_in
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.checkpoint.torch_file import read_torch_file, torch_file_bytes
from lightning_zero.errors import CheckpointWriteError, CorruptCheckpointError

_LIGHTNING_VERSION = "2.5.0"
"""Of the dict that is made up for a run that knew no Lightning: later releases bring it up to date."""


def import_deepspeed_checkpoint(
    source: PathOrUrl,
    save_dir: PathOrUrl,
    tag: str | None = None,
    *,
    submodule: str = "",
    module_only: bool = False,
    weights_only: bool = True,
    verify: bool = True,
    progress: Progress = lambda nbytes: None,
) -> Location:
    """Write a DeepSpeed checkpoint as one of ours, from which a `ZeroStrategy` resumes on any number of ranks.

    DeepSpeed needn't be installed. ZeRO stages 0 to 3 and `BF16_Optimizer` are read, by `deepspeed` itself or by
    Lightning's `DeepSpeedStrategy`; models that are themselves cut over ranks, and experts, are not.

    Args:
        source: DeepSpeed's save directory, a tag's, or Lightning's `NAME.ckpt`.
        save_dir: where the tag is written, under DeepSpeed's name for it; `latest` names it then.
        tag: of the source; its `latest` decides where it is None.
        submodule: the name that the saved module has within the LightningModule: `"model"`, where a plain DeepSpeed run
            trained what is `self.model` there.
        module_only: leave the optimizer out.
        weights_only: refuse files that name what would run code when they are loaded. Here it doesn't in any case.
        verify: compare the source with its own checksums first.
        progress: is told of bytes as they are read.

    Returns:
        The tag's directory.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        IncompleteCheckpointError: a rank's file, or a part of a parameter, is missing.
        CorruptCheckpointError: a file is damaged, or of another run.
        UntrustedContentError: it holds what would run code.
        CheckpointMismatchError: it can't be told which state is which parameter's (stage 0).
        UnsupportedModelError: the model is cut over ranks, or has experts.
        CheckpointWriteError: the tag can't be written, or is there already; what was there is there.
    """
    checkpoint = read_deepspeed(
        find_deepspeed_tag(source, tag),
        module_only=module_only,
        submodule=submodule,
        weights_only=weights_only,
        verify=verify,
        progress=progress,
    )
    return write_imported(checkpoint, locate(save_dir), weights_only=weights_only, verify=verify).path


def write_imported(
    checkpoint: DeepSpeedCheckpoint, save_dir: Location, *, weights_only: bool = True, verify: bool = True
) -> SaveReport:
    """Write what was read: see `import_deepspeed_checkpoint`."""
    directory = absolute(save_dir) / checkpoint.name
    _require_no_deepspeed(directory)
    commit.require_replaceable(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise CheckpointWriteError(
            f"{directory} is a checkpoint already, which was left as it is; import into another directory, or remove it"
        )
    trainer = _trainer_bytes(checkpoint, weights_only)
    step, epoch = _progress_of(checkpoint)
    shared = SharedContent(
        epoch,
        checkpoint.stage,
        checkpoint.entries,
        checkpoint.aliases,
        [OptimizerEntry(checkpoint.optimizer, tuple(group.names for group in checkpoint.groups))]
        if checkpoint.groups
        else [],
        trainer,
    )

    def contents() -> Iterator[RankContent]:
        for rank in checkpoint.ranks:
            if verify:
                for record in sorted(rank.records, key=lambda record: (str(record.path), record.place.offset)):
                    record.verify()
            yield _content(rank, step)

    return save_for_ranks(directory, contents(), shared, world_size=len(checkpoint.ranks))


def bytes_to_read(checkpoint: DeepSpeedCheckpoint, *, verify: bool) -> int:
    """What `progress` will add up to."""
    nbytes = 0
    for rank in checkpoint.ranks:
        pieces = (*rank.trained, *rank.frozen, *rank.others)
        nbytes += sum(piece.value.nbytes for piece in pieces if isinstance(piece.value, Elements))
        nbytes += sum(record.nbytes for record in rank.records) if verify else 0
    return nbytes


def _require_no_deepspeed(directory: Location) -> None:
    """What DeepSpeed has written stays as it is, and so does its `latest`."""
    beside = [directory.parent / name for name in names_in(directory.parent)]
    for there in (directory, directory.parent, *beside):
        if is_deepspeed_tag(there) or is_deepspeed_tag(there / LIGHTNING_TAG):
            raise CheckpointWriteError(
                f"{directory.parent} holds {there.name!r}, a checkpoint of DeepSpeed's, which `latest` may name; "
                "import into another directory"
            )


def _content(rank: Rank, step: int) -> RankContent:
    values = [
        StoredValue(0, piece.segment.name, piece.segment.start, piece.segment.stop, piece.state, piece.value)
        for piece in rank.trained
        if piece.state not in (None, "step") and not isinstance(piece.value, Elements)
    ]
    trained = [_tensor(piece) for piece in rank.trained if isinstance(piece.value, Elements) or piece.state == "step"]
    return RankContent([*trained, *map(_given, rank.others)], values, b"", step, [*map(_given, rank.frozen)])


def _tensor(piece: Piece) -> TensorToSave:
    name, start, stop = piece.segment.name, piece.segment.start, piece.segment.stop
    if not isinstance(piece.value, Elements):  # the step: torch's own optimizers keep it so
        return TensorToSave("optimizer", name, start, stop, torch.tensor(piece.value), 0, piece.state)
    if piece.state is not None:
        return TensorToSave("optimizer", name, start, stop, LazyTensor(piece.value), 0, piece.state)
    # Masters may be narrower there; ours never are
    master = piece.value if piece.value.stored in MASTER_CODES else piece.value.shown_in("F32")
    return TensorToSave("model", name, start, stop, LazyTensor(master))


def _given(piece: Piece) -> TensorToSave:
    """What isn't trained, as it is."""
    assert isinstance(piece.value, Elements)
    return TensorToSave("model", piece.segment.name, piece.segment.start, piece.segment.stop, LazyTensor(piece.value))


# -------------------------------------------------------------------------------------------------- trainer.pt


def _trainer_bytes(checkpoint: DeepSpeedCheckpoint, weights_only: bool) -> bytes:
    """The content of `trainer.pt`, which loads."""
    where = f"{checkpoint.directory}: the client state"
    try:
        content = torch_file_bytes(_trainer(checkpoint), TRAINER_NAME)
    except (PicklingError, TypeError) as error:
        raise CorruptCheckpointError(f"{where} can't be written again: {error}") from error
    read_torch_file(content, where, weights_only=weights_only)
    return content


def _trainer(checkpoint: DeepSpeedCheckpoint) -> dict[Any, Any]:
    """Lightning's dict without its tensors, in the terms of `pickled`."""
    if checkpoint.is_lightnings:
        trainer = dict(checkpoint.client_state)
    else:
        trainer = {
            "epoch": 0,
            "global_step": checkpoint.step,
            "pytorch-lightning_version": _LIGHTNING_VERSION,
            "loops": loops_after(checkpoint.step),
            "callbacks": {},
            "lr_schedulers": _schedulers(checkpoint),
            CLIENT_STATE: checkpoint.client_state,
        }
    trainer["state_dict"] = checkpoint.odd
    trainer["optimizer_states"] = []
    numbers = iter(range(sum(len(group.names) for group in checkpoint.groups)))
    if checkpoint.groups:
        groups = [{**group.settings, "params": [next(numbers) for _ in group.names]} for group in checkpoint.groups]
        trainer["optimizer_states"] = [{"state": {}, "param_groups": groups}]
    return trainer


def _schedulers(checkpoint: DeepSpeedCheckpoint) -> list[Any]:
    state = checkpoint.scheduler
    if isinstance(state, dict) and "last_epoch" in state:
        return [state]
    if state is not None:
        warnings.warn(
            f"{checkpoint.directory} has the state of a scheduler of DeepSpeed's own, which no other takes: it isn't "
            f"imported. Have yours begin at step {checkpoint.step} (last_epoch={checkpoint.step}, once each param "
            "group has its 'initial_lr')",
            stacklevel=4,
        )
    return []


def _progress_of(checkpoint: DeepSpeedCheckpoint) -> tuple[int, int]:
    """The step and the epoch that training goes on from."""
    if not checkpoint.is_lightnings:
        return checkpoint.step, 0
    step, epoch = (checkpoint.client_state.get(key) for key in ("global_step", "epoch"))
    if type(step) is not int or type(epoch) is not int or step < 0 or epoch < 0:
        raise CorruptCheckpointError(
            f"{checkpoint.directory}: Lightning's step is {step!r:.40}, its epoch {epoch!r:.40}"
        )
    return step, epoch
