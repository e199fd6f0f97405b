"""What all ranks do together to save a checkpoint.

Four phases: `Proposal`, `prepare`, `write`, `finish`. What the ranks agree on travels while each prepares. After that
nothing that training goes on to change is looked at any more, so the last two can go on behind it (`background`),
in a group of their own. `prepare` and `write` have no collectives. What goes wrong on one rank is everybody's: see
[Note: all ranks fail together].
"""

from __future__ import annotations

import io
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.failures import Failure, attempt
from lightning_zero.checkpoint.finish import finish
from lightning_zero.checkpoint.integrity import read_manifest
from lightning_zero.checkpoint.manifest import FileEntry, Manifest, StoredTensor, StoredValue, TrainerFile
from lightning_zero.checkpoint.nodes import Place
from lightning_zero.checkpoint.plan import Plan, Proposal, TagValidation, abandoning
from lightning_zero.checkpoint.report import MOST_LINKS, SaveReport, StoredFile, Written
from lightning_zero.checkpoint.shards import Item, check_header, shard_name, trainer_name, verify_tensors, write_shard
from lightning_zero.checkpoint.snapshot import Snapshot
from lightning_zero.checkpoint.storage import Location, create_file, is_remote, link, open_file, remove_file
from lightning_zero.checkpoint.tensors import code_of, tensor_chunks
from lightning_zero.errors import CheckpointWriteError

RANK_STATE = "state"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one rank is going to write, when nothing of it can change any more.

    Attributes:
        content: with the frozen parameters only if they have to be written.
        linked: the file of an earlier save that stands for them else.
        live: what it stands for: to be written if the file is not what it was.
        trainer: on rank 0, the bytes of `trainer.pt`.
    """

    content: RankContent
    linked: StoredFile | None
    live: Sequence[TensorToSave]
    trainer: memoryview | None


def save_checkpoint(
    directory: Location,
    content: RankContent,
    shared: SharedContent | None,
    *,
    group: dist.ProcessGroup | None,
    **options: Any,
) -> SaveReport:
    """Save a checkpoint, called on every rank; when it returns, the checkpoint is there, whole, on all.

    Args and errors are those of `begin_save` and of what it returns.
    """
    return begin_save(directory, content, shared, group=group, **options)()


def begin_save(
    directory: Location,
    content: RankContent | Exception,
    shared: SharedContent | None,
    *,
    group: dist.ProcessGroup | None,
    update_latest: bool = True,
    fsync: bool = True,
    tag_validation: TagValidation = "fail",
    place: Place | None = None,
    frozen_before: StoredFile | None = None,
    snapshot: Snapshot | None = None,
    group_behind: dist.ProcessGroup | None = None,
    began: float | None = None,
) -> Callable[[], SaveReport]:
    """Do what training has to wait for, and give what is left to be done: collective, both of them.

    Args:
        directory: the tag's directory, on storage that all ranks share.
        content: what this rank puts in, or why it can't.
        shared: what the ranks have in common; needed on rank 0.
        group: the ranks; None for a single process.
        update_latest: have `latest` name the tag.
        fsync: make everything durable before it takes its name.
        tag_validation: what to do where the ranks were given different tags: see `Proposal`.
        place: where this rank is, if every node has its own disk: see [Note: a checkpoint on every node].
        frozen_before: this rank's frozen parameters in an earlier save, for `prepare`.
        snapshot: where to copy what is to be saved, so that training may go on before the rest is done.
        group_behind: the ranks again, for the rest, where training goes on.
        began: when the save did, by `time.perf_counter()`; now, if not given.

    Raises:
        TagMismatchError: the ranks were to save different tags or steps.
        CheckpointWriteError: a rank failed. Both are raised on every rank alike: see [Note: all ranks fail together].
    """
    if shared is not None and not update_latest and not isinstance(content, Exception):
        content = _refuse_to_leave_latest_without_states(directory, content, shared)
    proposal = Proposal(
        directory, content, group, tag_validation=tag_validation, place=place, clean=snapshot is None, began=began
    )
    with abandoning(proposal):
        if isinstance(content, Exception):
            proposal.agreed()  # raises it, everywhere
            raise content
        prepare_here = partial(prepare, proposal.rank, directory, content, shared, snapshot=snapshot)
        prepared = prepare_here(frozen_before=frozen_before)
        plan = proposal.agreed()
        prepared = _link(plan, prepared, without=prepare_here)
    stall_seconds = time.perf_counter() - plan.began

    def rest() -> SaveReport:
        with abandoning(plan):
            ready = attempt(plan.rank, plan.staging, partial(_get_ready, plan, snapshot)) or prepared
            written = write(plan, ready, fsync=fsync, direct=snapshot is not None, stall_seconds=stall_seconds)
        then = plan if snapshot is None else replace(plan, group=group_behind)
        report = finish(then, written, shared, update_latest=update_latest, fsync=fsync)
        return report if snapshot is not None else replace(report, stall_seconds=report.seconds)

    return rest


def _get_ready(plan: Plan, snapshot: Snapshot | None) -> None:
    """What a save behind training has left for later: training would have waited for it."""
    if snapshot is not None:
        if plan.staged is not None:
            commit.clean_leftovers(plan.directory.parent)
        snapshot.wait()


def save_for_ranks(
    directory: Location, contents: Iterable[RankContent], shared: SharedContent, *, world_size: int
) -> SaveReport:
    """Save what several ranks held, in one process without a group: a rank after the other.

    Args:
        directory: the tag's directory.
        contents: of each rank, in their order; asked for the next one when one is written.
        shared: what they have in common.
        world_size: how many there are.

    Raises:
        CheckpointWriteError: a file can't be written. As with whatever `contents` raises, nothing has changed then.
    """
    ranks = iter(contents)
    content = next(ranks)
    proposal = Proposal(directory, content, None)
    with abandoning(proposal):
        plan = replace(proposal.agreed(), world_size=world_size)
        written = [write(plan, prepare(0, directory, content, shared))]
        for rank, content in enumerate(ranks, 1):
            written.append(write(replace(plan, rank=rank), prepare(rank, directory, content, shared)))
    return finish(plan, written[0], shared, others=written[1:])


def _refuse_to_leave_latest_without_states(
    directory: Location, content: RankContent, shared: SharedContent
) -> RankContent | Exception:
    try:
        if shared.optimizers or commit.read_latest(directory.parent) != directory.name:
            return content
        if not read_manifest(directory).optimizers:
            return content
    except Exception:  # a store's own kinds too: the other ranks wait for this one
        return content
    return CheckpointWriteError(
        f"`latest` names {directory.name!r}, which training can resume from, and it was to be replaced by weights "
        "alone: save them under another name"
    )


# ---------------------------------------------------------------------------------------------------- prepare


def prepare(
    rank: int,
    directory: Location,
    content: RankContent,
    shared: SharedContent | None,
    *,
    frozen_before: StoredFile | None = None,
    snapshot: Snapshot | None = None,
) -> _Prepared | Failure:
    """Get everything ready to be written. No collectives, and training waits: not safe in a thread.

    Args:
        rank: this one.
        directory: the tag's.
        content: what this rank puts in.
        shared: needed on rank 0.
        frozen_before: what stands for this rank's frozen parameters if every byte of them is still the same: the file
            is to be linked (behind a URL, copied there) and not written again.
        snapshot: where to copy what is left to be written.
    """

    def do() -> _Prepared:
        linked = frozen_before if _stands_for(frozen_before, content.unchanging) else None
        rest = replace(content, unchanging=()) if linked is not None else content
        rest = snapshot.take(rest) if snapshot is not None else rest
        trainer = None
        if rank == 0:
            if shared is None:
                raise ValueError("rank 0 has to say what the ranks share")
            trainer = _serialize(shared.trainer)
        if linked is not None:
            linked = replace(linked, links=0 if linked.links >= MOST_LINKS else linked.links + 1)
        return _Prepared(rest, linked, content.unchanging, trainer)

    return attempt(rank, directory, do)


def _stands_for(before: StoredFile | None, frozen: Sequence[TensorToSave]) -> bool:
    """Whether an earlier file holds just the frozen parameters, as they are now."""
    return (
        before is not None
        and 0 < len(frozen) == len(before.entry.tensors)
        and not any(check_header(before.path, before.entry))
        and _are_stored(frozen, before.entry.tensors)
    )


def _link(plan: Plan, prepared: _Prepared | Failure, without: Callable[[], _Prepared | Failure]) -> _Prepared | Failure:
    """Give the earlier file its name in this save; where there can be no links, prepare it without."""
    if isinstance(prepared, Failure) or prepared.linked is None:
        return prepared
    linked = attempt(plan.rank, plan.staging, partial(link, prepared.linked.path, plan.staging / _frozen_name(plan)))
    return linked if isinstance(linked, Failure) else prepared if linked else without()


def _frozen_name(plan: Plan) -> str:
    return shard_name(plan.rank, plan.world_size, frozen=True, save_id=plan.id_in_names)


def holds_model(manifest: Manifest, rank: int, content: RankContent, shared: SharedContent) -> bool:
    """Whether a checkpoint holds this rank's part of the model, byte for byte as it is now."""
    if manifest.entries != tuple(shared.entries) or manifest.aliases != shared.aliases:
        return False
    own = [tensor for file in manifest.files if file.rank == rank for tensor in file.tensors if tensor.kind == "model"]
    return _are_stored([item for item in (*content.tensors, *content.unchanging) if item.kind == "model"], own)


def _are_stored(items: Iterable[TensorToSave], stored: Iterable[StoredTensor]) -> bool:
    """Whether every tensor of the model is among the stored ones, with the same bytes.

    Not by a version counter: what is written through `.data` doesn't count.
    """
    digests = {(tensor.name, tensor.start, tensor.stop, tensor.dtype): tensor.xxh3 for tensor in stored}
    places = [(item, (item.name, item.start, item.stop, code_of(item.tensor, item.name))) for item in items]
    return all(place in digests for _, place in places) and all(
        _digest(item.tensor) == digests[place] for item, place in places
    )


def _digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_64()
    for chunk in tensor_chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _serialize(trainer: dict[str, Any] | bytes) -> memoryview:
    if isinstance(trainer, bytes):
        return memoryview(trainer)
    stream = io.BytesIO()
    torch.save(trainer, stream)
    # Not its buffer, which keeps a stream from closing: Python 3.13 complains of that when it is collected
    return memoryview(stream.getvalue())


def _warn_of_unsafe_globals(content: memoryview) -> None:
    """Say it now, while it is easily mended, and not when somebody wants to resume."""
    stream = io.BytesIO(content)
    try:
        torch.load(stream, map_location="cpu", weights_only=True)
    except EOFError:
        return  # nothing was written: torch.save is somebody's mock
    except pickle.UnpicklingError:
        stream.seek(0)
        offending = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(stream)) or "an unknown class"
        warnings.warn(
            f"the checkpoint holds objects of {offending}, in the hyper-parameters, a callback's state, client state "
            "or the like. Loading it will need weights_only=False, which runs what the file says: "
            "save a plain value in its place (str(path) for a pathlib.Path)",
            stacklevel=2,
        )


# ------------------------------------------------------------------------------------------------------ write


def write(
    plan: Plan,
    prepared: _Prepared | Failure,
    *,
    fsync: bool = True,
    direct: bool = False,
    stall_seconds: float = 0.0,
) -> Written | Failure:
    """Write this rank's files into the staging directory. No collectives: safe in a thread of its own.

    Args:
        plan: of the save.
        prepared: what to write.
        fsync: make it durable.
        direct: spare the processor rather than the disk: see `storage.create_file`.
        stall_seconds: how long training has waited.
    """
    if isinstance(prepared, Failure):
        return prepared
    return attempt(plan.rank, plan.staging, partial(_write, plan, prepared, fsync, direct, stall_seconds))


def _write(plan: Plan, prepared: _Prepared, fsync: bool, direct: bool, stall_seconds: float) -> Written:
    began = time.perf_counter()
    content = prepared.content
    if not (is_remote(plan.staging) or plan.staging.is_dir()):
        raise FileNotFoundError(
            f"the directory that rank 0 made is not visible here; all ranks have to save to one shared file system, "
            f"and {plan.directory.parent} is not on one"
        )
    items = [_item(tensor) for tensor in content.tensors]
    if content.rank_state:
        state = memoryview(content.rank_state)
        items.append(Item("rank", RANK_STATE, 0, len(state), "U8", (len(state),), lambda: [state]))
    write_file = partial(_write_file, plan, fsync=fsync, direct=direct)
    files = [write_file(items, content.values)]
    if content.unchanging:
        files.append(write_file([_item(tensor) for tensor in content.unchanging], (), frozen=True))
    nbytes = sum(file.nbytes for file in files)
    if prepared.linked is not None:
        entry = prepared.linked.entry
        linked, damaged = msgspec.structs.replace(entry, name=_frozen_name(plan), rank=plan.rank), False
        if prepared.linked.links == 0:
            damaged = any(verify_tensors(open_file(plan.staging / linked.name), linked, linked.tensors))
        if damaged:
            remove_file(plan.staging / linked.name)
            expected = {tensor.key: tensor.xxh3 for tensor in linked.tensors}
            linked = write_file([_item(tensor) for tensor in prepared.live], (), frozen=True)
            if {tensor.key: tensor.xxh3 for tensor in linked.tensors} != expected:
                raise RuntimeError(
                    f"{entry.name} of an earlier checkpoint is damaged, and the frozen parameters that it held were "
                    "changed while they were written anew, behind training. The next save writes what they are then"
                )
            nbytes += linked.nbytes
        files.append(linked)
    trainer = None
    if prepared.trainer is not None:
        _warn_of_unsafe_globals(prepared.trainer)
        trainer = _write_trainer(plan, prepared.trainer, fsync)
        nbytes += trainer.nbytes
    seconds = time.perf_counter() - began
    links = prepared.linked.links if prepared.linked is not None else 0
    return Written(tuple(files), trainer, nbytes, seconds, stall_seconds, links)


def _write_file(
    plan: Plan,
    items: Sequence[Item],
    values: Sequence[StoredValue],
    *,
    fsync: bool,
    direct: bool,
    frozen: bool = False,
) -> FileEntry:
    name = shard_name(plan.rank, plan.world_size, frozen=frozen, save_id=plan.id_in_names)
    return write_shard(
        plan.staging / name,
        items,
        values,
        rank=plan.rank,
        step=plan.step,
        save_id=plan.save_id,
        frozen=frozen,
        fsync=fsync,
        direct=direct,
    )


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


def _write_trainer(plan: Plan, content: memoryview, fsync: bool) -> TrainerFile:
    name = trainer_name(plan.id_in_names)
    with create_file(plan.staging / name, len(content), fsync=fsync) as file:
        file.write(content)
    return TrainerFile(name, len(content), xxhash.xxh3_64_hexdigest(content))
