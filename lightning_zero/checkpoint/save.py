"""What all ranks do together to save a checkpoint. The one file of this room with a process group.

Three phases: `agree`, `write`, `finish`. Only the first and the last have collectives, so that a later caller can put
`write` behind training.

[Note: all ranks fail together]
Between two collectives no rank raises: whatever goes wrong on it becomes a `_Failure`, which travels with the next
collective. Then every rank raises the same CheckpointWriteError, which names the rank that failed. So nobody waits for
a rank that has given up. What each step's failure leaves behind:

| fails | where | on disk | what every rank raises |
|---|---|---|---|
| the tags or steps differ | `agree` | nothing new | TagMismatchError, with what each rank wanted |
| the staging directory can't be made | `agree` | nothing new | CheckpointWriteError |
| a shard or `trainer.pt` can't be written | `write` | the staging directory goes | CheckpointWriteError |
| a file of another rank isn't visible to rank 0 | `finish` | the staging directory goes | CheckpointWriteError |
| the commit | `finish` | see [Note: the commit, step by step] | CheckpointWriteError |
| a rank is killed | any | staging, which the next save removes | CheckpointWriteError, or the group's time-out |

In none of these cases is an earlier tag touched, and `latest` names what it named.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAINER_NAME,
    Entry,
    FileEntry,
    Kind,
    Manifest,
    OptimizerEntry,
    StoredValue,
    TrainerFile,
)
from lightning_zero.checkpoint.shards import Item, shard_name, write_shard
from lightning_zero.checkpoint.tensors import code_of, tensor_chunks
from lightning_zero.errors import CheckpointWriteError, TagMismatchError, ZeroError

RANK_STATE = "state"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TensorToSave:
    """A tensor on its way into a checkpoint: `StoredTensor` says what the fields mean.

    `tensor` is 1-D where it has one element for each of the segment's, and of any shape where it is whole.
    """

    kind: Kind
    name: str
    start: int
    stop: int
    tensor: Tensor
    optimizer: int | None = None
    state: str | None = None


@dataclass(frozen=True, slots=True)
class RankContent:
    """What one rank puts into a checkpoint.

    Attributes:
        tensors: its segments, and their optimizer states.
        values: the optimizer states that are no tensors.
        rank_state: what this rank alone needs to go on (the state of its random numbers); given back as it is.
        step: of training, as this rank sees it.
    """

    tensors: Sequence[TensorToSave]
    values: Sequence[StoredValue]
    rank_state: bytes
    step: int


@dataclass(frozen=True, slots=True)
class SharedContent:
    """What the ranks have in common; only rank 0's is looked at.

    Attributes:
        epoch: of training.
        stage: of ZeRO.
        entries: the module's state dict, in its order.
        aliases: tied tensors: the other name, to the name under which it is stored.
        optimizers: in the trainer's order.
        trainer: everything else, for `trainer.pt`.
    """

    epoch: int
    stage: int
    entries: Sequence[Entry]
    aliases: Mapping[str, str]
    optimizers: Sequence[OptimizerEntry]
    trainer: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did: the bytes of the whole checkpoint, the seconds that this rank spent, and the tag's directory."""

    bytes: int
    seconds: float
    path: Path


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong on one rank, in a form that travels; `error` stays behind."""

    rank: int
    text: str
    error: BaseException | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[_Failure], tuple[int, str]]:
        return _Failure, (self.rank, self.text)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one rank has written."""

    file: FileEntry
    trainer: TrainerFile | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A save that all ranks have agreed on.

    Attributes:
        directory: the tag's, as this rank spells it.
        staging: where the files go first.
        save_id: of this save.
        step: of training.
        rank: this one.
        world_size: of how many.
        group: they, or None for a single process.
        lock: on rank 0, what holds the lock on the staging directory.
    """

    directory: Path
    staging: Path
    save_id: str
    step: int
    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    lock: commit.StagingLock | None


def save_checkpoint(
    directory: Path,
    content: RankContent,
    shared: SharedContent | None,
    *,
    group: dist.ProcessGroup | None,
    update_latest: bool = True,
    fsync: bool = True,
) -> SaveReport:
    """Save a checkpoint, called on every rank; when it returns, the checkpoint is there, whole, on all.

    Args:
        directory: the tag's directory, on a file system that all ranks share.
        content: what this rank puts in.
        shared: what the ranks have in common; needed on rank 0.
        group: the ranks; None for a single process.
        update_latest: have `latest` name the tag.
        fsync: make everything durable before it takes its name.

    Raises:
        TagMismatchError: the ranks were to save different tags or steps.
        CheckpointWriteError: a rank failed. Both are raised on every rank alike: see [Note: all ranks fail together].
    """
    began = time.perf_counter()
    plan = agree(directory, content.step, group)
    nbytes = finish(plan, write(plan, content, shared, fsync=fsync), shared, update_latest=update_latest, fsync=fsync)
    return SaveReport(nbytes, time.perf_counter() - began, plan.directory)


# ------------------------------------------------------------------------------------------------------ agree


def agree(directory: Path, step: int, group: dist.ProcessGroup | None) -> Plan:
    """Make sure that all ranks save the same, and make the staging directory. Collective.

    Raises:
        TagMismatchError: they don't.
        CheckpointWriteError: the directory can't be made.
    """
    directory = Path(os.path.abspath(directory))
    rank, world_size = (group.rank(), group.size()) if group is not None else (0, 1)
    save_id = secrets.token_hex(8) if rank == 0 else ""
    lock = _attempt(rank, directory, partial(_prepare, directory, rank, save_id))
    failure = lock if isinstance(lock, _Failure) else None
    answers = _all_gather(group, (directory.name, step, save_id, failure))
    save_id = answers[0][2]
    staging = commit.staging_directory(directory.parent, directory.name, save_id)
    lock = None if isinstance(lock, _Failure) else lock
    plan = Plan(directory, staging, save_id, step, rank, world_size, group, lock)
    wanted = [(tag, step) for tag, step, *_ in answers]
    if len(set(wanted)) > 1:
        _abandon(plan)
        listed = "; ".join(f"rank {rank}: {tag!r} at step {step}" for rank, (tag, step) in enumerate(wanted[:16]))
        raise TagMismatchError(
            f"the ranks were asked to save different things ({listed}). "
            "Every rank has to save the same tag at the same step"
        )
    failed = next((found for *_, found in answers if found is not None), None)
    if failed is not None:
        _abandon(plan)
        raise _error(plan, failed) from (failure.error if failure is not None and failure == failed else None)
    return plan


def _prepare(directory: Path, rank: int, save_id: str) -> commit.StagingLock | None:
    commit.validate_tag(directory.name, hidden=True)
    if rank != 0:
        return None
    commit.clean_leftovers(directory.parent)
    return commit.make_staging(commit.staging_directory(directory.parent, directory.name, save_id))


# ------------------------------------------------------------------------------------------------------ write


def write(plan: Plan, content: RankContent, shared: SharedContent | None, *, fsync: bool = True) -> _Written | _Failure:
    """Write this rank's files into the staging directory. No collectives: safe in a thread of its own."""
    return _attempt(plan.rank, plan.staging, partial(_write, plan, content, shared, fsync))


def _write(plan: Plan, content: RankContent, shared: SharedContent | None, fsync: bool) -> _Written:
    path = plan.staging / shard_name(plan.rank, plan.world_size)
    if not plan.staging.is_dir():
        raise FileNotFoundError(
            f"the directory that rank 0 made is not visible here; all ranks have to save to one shared file system, "
            f"and {plan.directory.parent} is not on one"
        )
    items = [_item(tensor) for tensor in content.tensors]
    if content.rank_state:
        state = memoryview(content.rank_state)
        items.append(Item("rank", RANK_STATE, 0, len(state), "U8", (len(state),), lambda: [state]))
    file = write_shard(
        path, items, content.values, rank=plan.rank, step=content.step, save_id=plan.save_id, fsync=fsync
    )
    if plan.rank != 0:
        return _Written(file, None)
    if shared is None:
        raise ValueError("rank 0 has to say what the ranks share")
    return _Written(file, _write_trainer(plan.staging / TRAINER_NAME, shared.trainer, fsync))


def _item(tensor: TensorToSave) -> Item:
    return Item(
        tensor.kind,
        tensor.name,
        tensor.start,
        tensor.stop,
        code_of(tensor.tensor, tensor.name),
        tuple(tensor.tensor.shape),
        partial(tensor_chunks, tensor.tensor),
        tensor.optimizer,
        tensor.state,
    )


def _write_trainer(path: Path, trainer: dict[str, Any], fsync: bool) -> TrainerFile:
    stream = io.BytesIO()
    torch.save(trainer, stream)
    content = stream.getbuffer()
    _warn_of_unsafe_globals(stream)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    return TrainerFile(len(content), xxhash.xxh3_64_hexdigest(content))


def _warn_of_unsafe_globals(stream: io.BytesIO) -> None:
    """Say it now, while it is easily mended, and not when somebody wants to resume."""
    stream.seek(0)
    try:
        torch.load(stream, map_location="cpu", weights_only=True)
    except EOFError:
        return  # nothing was written: torch.save is somebody's mock
    except pickle.UnpicklingError:
        stream.seek(0)
        offending = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(stream)) or "an unknown class"
        warnings.warn(
            f"the checkpoint holds objects of {offending}, in the hyper-parameters or the state of a callback. "
            "Loading it will need weights_only=False, which runs what the file says: "
            "save a plain value in its place (str(path) for a pathlib.Path)",
            stacklevel=2,
        )


# ----------------------------------------------------------------------------------------------------- finish


def finish(
    plan: Plan,
    written: _Written | _Failure,
    shared: SharedContent | None,
    *,
    update_latest: bool = True,
    fsync: bool = True,
) -> int:
    """Commit what all ranks have written, if all have. Collective.

    Returns:
        The bytes of the whole checkpoint.

    Raises:
        CheckpointWriteError: a rank failed; the staging directory is gone.
    """
    outcome: int | _Failure = 0  # rank 0's, which the others are sent
    try:
        reports = _gather(plan.group, written)
        if plan.rank == 0:
            done = [report for report in reports if isinstance(report, _Written)]
            failed = next((report for report in reports if isinstance(report, _Failure)), None)
            action = partial(_commit, plan, done, shared, update_latest, fsync)
            outcome = failed if failed is not None else _attempt(0, plan.directory, action)
            if isinstance(outcome, _Failure):
                _abandon(plan)
        decided = _broadcast(plan.group, outcome)
    except RuntimeError as error:  # what a group raises when a peer has died
        _abandon(plan)
        raise CheckpointWriteError(
            f"{plan.directory} was not saved: a rank died, or can't be reached any more ({error})"
        ) from error
    finally:
        if plan.lock is not None:
            plan.lock.release()
    if isinstance(decided, _Failure):
        own = next((mine for mine in (written, outcome) if isinstance(mine, _Failure) and mine == decided), None)
        raise _error(plan, decided) from (own.error if own else None)
    return decided


def _commit(
    plan: Plan, reports: Sequence[_Written], shared: SharedContent | None, update_latest: bool, fsync: bool
) -> int:
    trainer = reports[0].trainer
    if shared is None or trainer is None:
        raise ValueError("rank 0 has to say what the ranks share")
    for rank, report in enumerate(reports):
        path = plan.staging / report.file.name
        size = path.stat().st_size if path.exists() else None
        if size != report.file.nbytes:
            raise FileNotFoundError(
                f"rank {rank} has written {report.file.nbytes} bytes of {path.name}, and rank 0 sees "
                f"{'no such file' if size is None else size}; all ranks have to save to one shared file system"
            )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        save_id=plan.save_id,
        step=plan.step,
        epoch=shared.epoch,
        world_size=plan.world_size,
        stage=shared.stage,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        entries=tuple(shared.entries),
        aliases=dict(shared.aliases),
        optimizers=tuple(shared.optimizers),
        files=tuple(report.file for report in reports),
        trainer=trainer,
    )
    text = manifest.to_json()
    Manifest.from_json(text, MANIFEST_NAME)  # what can't be loaded must not be committed
    # IMPORTANT: the manifest comes after every file that it lists is durable
    with open(plan.staging / MANIFEST_NAME, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    commit.commit(plan.staging, plan.directory.parent, plan.directory.name, update_latest=update_latest, fsync=fsync)
    return manifest.nbytes + len(text.encode())


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in ("lightning_zero", "lightning"):
        try:
            versions[name] = metadata.version(name.replace("_", "-"))
        except metadata.PackageNotFoundError:  # run from a checkout
            continue
    return versions


# --------------------------------------------------------------------------------------------------- failures


def _attempt(rank: int, where: Path, action: Callable[[], _T]) -> _T | _Failure:
    """Do it; whatever goes wrong travels to the other ranks and is raised on all: nothing is swallowed."""
    try:
        return action()
    except Exception as error:
        text = str(error) if isinstance(error, ZeroError) else f"{type(error).__name__}: {error}"
        return _Failure(rank, f"rank {rank} on {socket.gethostname()}, writing to {where}: {text}", error)


def _error(plan: Plan, failure: _Failure) -> CheckpointWriteError:
    # The tag and not the path: on every rank the same words, even where each spells the path in its own way
    return CheckpointWriteError(
        f"the checkpoint {plan.directory.name!r} was not saved: {failure.text}. Earlier checkpoints are as they were"
    )


def _abandon(plan: Plan) -> None:
    """Take the staging directory away, on the rank that made it."""
    if plan.lock is not None:
        shutil.rmtree(plan.staging, ignore_errors=True)
        plan.lock.release()


# ------------------------------------------------------------------------------------------------ collectives


def _all_gather(group: dist.ProcessGroup | None, value: _T) -> list[_T]:
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _gather(group: dist.ProcessGroup | None, value: _T) -> list[_T]:
    """Every rank's value on rank 0, and nothing elsewhere: reports are long, and rank 0 alone reads them."""
    if group is None:
        return [value]
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, dst=dist.get_global_rank(group, 0), group=group)
    return values or []


def _broadcast(group: dist.ProcessGroup | None, value: _T) -> _T:
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]
