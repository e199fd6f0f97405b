"""What all ranks do together to save a checkpoint. The one file of this room with a process group.

Four phases: `agree`, `prepare`, `write`, `finish`. After `prepare` nothing that training goes on to change is looked at
any more, so the last two can go on behind it (`background`), in a group of their own. `prepare` and `write` have no
collectives.

[Note: all ranks fail together]
Between two collectives no rank raises: whatever goes wrong on it becomes a `_Failure`, which travels with the next
collective. Then every rank raises the same CheckpointWriteError, which names the rank that failed. So nobody waits for
a rank that has given up. What each step's failure leaves behind:

| fails | where | on disk | what every rank raises |
|---|---|---|---|
| the tags or steps differ | `agree` | nothing new | TagMismatchError, with what each rank wanted |
| the staging directory can't be made | `agree` | nothing new | CheckpointWriteError |
| a shard or `trainer.pt` can't be written | `prepare`, `write` | the staging directory goes | CheckpointWriteError |
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
import socket
import time
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from lightning_zero.checkpoint import commit, nodes
from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAINER_NAME,
    FileEntry,
    Manifest,
    StoredValue,
    TrainerFile,
)
from lightning_zero.checkpoint.nodes import Place
from lightning_zero.checkpoint.shards import Item, check_header, shard_name, write_shard
from lightning_zero.checkpoint.snapshot import Snapshot
from lightning_zero.checkpoint.storage import Location, absolute, create_file, is_remote, link
from lightning_zero.checkpoint.tensors import code_of, tensor_chunks
from lightning_zero.errors import CheckpointWriteError, TagMismatchError, ZeroError

RANK_STATE = "state"

TagValidation = Literal["fail", "warn", "ignore"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of frozen parameters that this rank has written, or linked, in an earlier save."""

    path: Location
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Attributes:
        path: the tag's directory.
        step: of training.
        bytes: of the whole checkpoint.
        written_bytes: of it, what was written by this save, and not linked from the one before.
        seconds: from the call until the checkpoint was committed, on this rank.
        stall_seconds: how long training waited: this rank's, or behind training the longest of all ranks'.
        rank_seconds: how long each rank wrote.
        frozen: this rank's file of frozen parameters, if there are any.
    """

    path: Location
    step: int
    bytes: int
    written_bytes: int
    seconds: float
    stall_seconds: float
    rank_seconds: tuple[float, ...]
    frozen: StoredFile | None = None

    @property
    def slowest_rank(self) -> int:
        """The rank that wrote longest."""
        return max(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)

    def __str__(self) -> str:
        """One line for the log."""
        gigabytes, linked = self.written_bytes / 1e9, self.bytes - self.written_bytes
        return (
            f"saved {self.path.name} at step {self.step}: {gigabytes:.3g} GB"
            f"{f' (and {linked / 1e9:.3g} GB linked)' if linked else ''} in {self.seconds:.3g} s "
            f"({gigabytes / self.seconds:.3g} GB/s); training waited {self.stall_seconds:.3g} s; "
            f"the slowest rank, {self.slowest_rank}, wrote for {max(self.rank_seconds):.3g} s"
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong on one rank, in a form that travels; `error` stays behind."""

    rank: int
    text: str
    error: BaseException | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[_Failure], tuple[int, str]]:
        return _Failure, (self.rank, self.text)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one rank is going to write, when nothing of it can change any more.

    Attributes:
        content: with the frozen parameters only if they have to be written.
        linked: their file, if an earlier save's stands for it.
        trainer: on rank 0, the bytes of `trainer.pt`.
        stall_seconds: how long training has waited till here.
    """

    content: RankContent
    linked: FileEntry | None
    trainer: memoryview | None
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class _Written:
    """What one rank has written."""

    files: tuple[FileEntry, ...]
    trainer: TrainerFile | None
    nbytes: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class _Committed:
    """What rank 0 tells the others of a checkpoint that is there; with its manifest, if they have to commit it too."""

    nbytes: int
    written_bytes: int
    stall_seconds: float
    rank_seconds: tuple[float, ...]
    manifest: str | None = None


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
        staged: on rank 0, and on every node's leader where each has its own disk, its hold on the staging directory.
        nodes: each rank's node; all of them 0 where storage is shared.
        leaders: the ranks that have a hold on one.
        began: when the save did, by `time.perf_counter()`.
    """

    directory: Location
    staging: Location
    save_id: str
    step: int
    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    staged: commit.Staging | None
    nodes: tuple[int, ...] = (0,)
    leaders: tuple[int, ...] = (0,)
    began: float = field(default_factory=time.perf_counter)

    @property
    def id_in_names(self) -> str:
        """What distinguishes this save's files from another's under the same tag, where they can meet."""
        return self.save_id if is_remote(self.directory) else ""


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
    report = begin_save(directory, content, shared, group=group, **options)()
    return replace(report, stall_seconds=report.seconds)


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
        tag_validation: what to do where the ranks were given different tags: see `agree`.
        place: where this rank is, if every node has its own disk: see [Note: a checkpoint on every node].
        frozen_before: this rank's frozen parameters in an earlier save, for `prepare`.
        snapshot: where to copy what is to be saved, so that training may go on before the rest is done.
        group_behind: the ranks again, for the rest, where training goes on.
        began: when the save did, by `time.perf_counter()`; now, if not given.

    Raises:
        TagMismatchError: the ranks were to save different tags or steps.
        CheckpointWriteError: a rank failed. Both are raised on every rank alike: see [Note: all ranks fail together].
    """
    plan = agree(directory, content, group, tag_validation=tag_validation, place=place, clean=snapshot is None)
    assert not isinstance(content, Exception)
    plan = plan if began is None else replace(plan, began=began)
    prepared = prepare(plan, content, shared, frozen_before=frozen_before, snapshot=snapshot)

    def rest() -> SaveReport:
        if snapshot is not None:
            snapshot.wait()
        written = write(plan, prepared, fsync=fsync, direct=snapshot is not None)
        then = plan if snapshot is None else replace(plan, group=group_behind)
        report = finish(then, written, shared, update_latest=update_latest, fsync=fsync)
        if snapshot is not None and plan.staged is not None:
            commit.clean_leftovers(plan.directory.parent)  # `agree` hasn't, so that training needn't wait for it
        return report

    return rest


# ------------------------------------------------------------------------------------------------------ agree


def agree(
    directory: Location,
    content: RankContent | Exception,
    group: dist.ProcessGroup | None,
    *,
    tag_validation: TagValidation = "fail",
    place: Place | None = None,
    clean: bool = True,
) -> Plan:
    """Make sure that all ranks save the same, and make the staging directory. Collective.

    Args:
        directory: the tag's.
        content: what this rank puts in, or why it can't.
        group: the ranks; None for a single process.
        tag_validation: what to do where the ranks were given different tags: `fail`; or take rank 0's, and `warn` of
            it, or `ignore` it. The steps have to be the same in any case.
        place: where this rank is, if every node has its own disk.
        clean: remove what dead saves have left, first.

    Raises:
        TagMismatchError: they don't.
        CheckpointWriteError: the directory can't be made, or a rank has nothing to put in.
    """
    directory = absolute(directory)
    rank, world_size = (group.rank(), group.size()) if group is not None else (0, 1)
    place = Place(0, rank == 0) if place is None else place
    token = secrets.token_hex(8) if place.leads else ""
    staged = _attempt(rank, directory, partial(_prepare_directory, directory, content, token, clean))
    failure = staged if isinstance(staged, _Failure) else None
    step = -1 if isinstance(content, Exception) else content.step
    try:
        answers = _all_gather(group, (directory.name, step, place.node, token, failure))
    except RuntimeError as error:
        if isinstance(staged, commit.Staging):
            staged.abandon()
        raise _unreachable(directory, error) from error
    wanted = [(tag, step) for tag, step, *_ in answers]
    nodes, tokens = tuple(node for _, _, node, *_ in answers), [token for *_, token, _ in answers]
    leaders = tuple(rank for rank, token in enumerate(tokens) if token)
    differ = len({tag for tag, _ in wanted}) > 1
    if differ and tag_validation != "fail":
        directory = directory.parent / wanted[0][0]
    staging = commit.staging_directory(
        directory.parent, directory.name, next(tokens[leader] for leader in leaders if nodes[leader] == place.node)
    )
    staged = None if isinstance(staged, _Failure) else staged
    plan = Plan(directory, staging, tokens[0], step, rank, world_size, group, staged, nodes, leaders)
    failed = next((found for *_, found in answers if found is not None), None)
    if failed is not None:
        _abandon(plan)
        raise _error(plan, failed) from (failure.error if failure is not None and failure == failed else None)
    if (differ and tag_validation == "fail") or len({step for _, step in wanted}) > 1:
        _abandon(plan)
        raise TagMismatchError(
            f"the ranks were asked to save different things ({_list_wanted(wanted)}). "
            "Every rank has to save the same tag at the same step"
        )
    if differ and tag_validation == "warn":
        warnings.warn(f"rank 0's tag is saved, of different ones ({_list_wanted(wanted)})", stacklevel=2)
    return plan


def _list_wanted(wanted: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"rank {rank}: {tag!r} at step {step}" for rank, (tag, step) in enumerate(wanted[:16]))


def _prepare_directory(
    directory: Location, content: RankContent | Exception, token: str, clean: bool
) -> commit.Staging | None:
    if isinstance(content, Exception):
        raise content
    commit.validate_tag(directory.name, hidden=True)
    if not token:
        return None
    if clean:
        commit.clean_leftovers(directory.parent)
    return commit.Staging(commit.staging_directory(directory.parent, directory.name, token), token)


# ---------------------------------------------------------------------------------------------------- prepare


def prepare(
    plan: Plan,
    content: RankContent,
    shared: SharedContent | None,
    *,
    frozen_before: StoredFile | None = None,
    snapshot: Snapshot | None = None,
) -> _Prepared | _Failure:
    """Get everything ready to be written. No collectives, and training waits: not safe in a thread.

    Args:
        plan: of the save.
        content: what this rank puts in.
        shared: needed on rank 0.
        frozen_before: what stands for this rank's frozen parameters if every byte of them is still the same: the file
            is linked (behind a URL, copied there) and not written again.
        snapshot: where to copy what is left to be written.
    """

    def do() -> _Prepared:
        linked = _link_frozen(plan, content, frozen_before)
        rest = replace(content, unchanging=()) if linked is not None else content
        rest = snapshot.take(rest) if snapshot is not None else rest
        trainer = None
        if plan.rank == 0:
            if shared is None:
                raise ValueError("rank 0 has to say what the ranks share")
            trainer = _serialize(shared.trainer)
        return _Prepared(rest, linked, trainer, time.perf_counter() - plan.began)

    return _attempt(plan.rank, plan.staging, do)


def _link_frozen(plan: Plan, content: RankContent, before: StoredFile | None) -> FileEntry | None:
    """Have an earlier file stand for the frozen parameters, if it holds just them, as they are now."""
    if before is None or not content.unchanging:
        return None
    entry = before.entry
    stored = {(tensor.name, tensor.start, tensor.stop, tensor.dtype): tensor.xxh3 for tensor in entry.tensors}
    live = {(item.name, item.start, item.stop, code_of(item.tensor, item.name)): item for item in content.unchanging}
    if stored.keys() != live.keys() or any(check_header(before.path, entry)):
        return None
    # Not by a version counter: what is written through `.data` doesn't count
    if any(_digest(item.tensor) != stored[key] for key, item in live.items()):
        return None
    name = shard_name(plan.rank, plan.world_size, frozen=True, save_id=plan.id_in_names)
    if not link(before.path, plan.staging / name):
        return None
    return replace(entry, name=name, rank=plan.rank)


def holds_model(manifest: Manifest, rank: int, content: RankContent, shared: SharedContent) -> bool:
    """Whether a checkpoint holds this rank's part of the model, byte for byte as it is now."""
    if manifest.entries != tuple(shared.entries) or manifest.aliases != shared.aliases:
        return False
    stored = {
        (tensor.name, tensor.start, tensor.stop, tensor.dtype): tensor.xxh3
        for file in manifest.files
        for tensor in file.tensors
        if file.rank == rank and tensor.kind == "model"
    }
    return all(
        stored.get((item.name, item.start, item.stop, code_of(item.tensor, item.name))) == _digest(item.tensor)
        for item in (*content.tensors, *content.unchanging)
        if item.kind == "model"
    )


def _digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_64()
    for chunk in tensor_chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _serialize(trainer: dict[str, Any]) -> memoryview:
    stream = io.BytesIO()
    torch.save(trainer, stream)
    return stream.getbuffer()


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
            f"the checkpoint holds objects of {offending}, in the hyper-parameters or the state of a callback. "
            "Loading it will need weights_only=False, which runs what the file says: "
            "save a plain value in its place (str(path) for a pathlib.Path)",
            stacklevel=2,
        )


# ------------------------------------------------------------------------------------------------------ write


def write(
    plan: Plan, prepared: _Prepared | _Failure, *, fsync: bool = True, direct: bool = False
) -> _Written | _Failure:
    """Write this rank's files into the staging directory. No collectives: safe in a thread of its own.

    Args:
        plan: of the save.
        prepared: what to write.
        fsync: make it durable.
        direct: spare the processor rather than the disk: see `storage.create_file`.
    """
    if isinstance(prepared, _Failure):
        return prepared
    return _attempt(plan.rank, plan.staging, partial(_write, plan, prepared, fsync, direct))


def _write(plan: Plan, prepared: _Prepared, fsync: bool, direct: bool) -> _Written:
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
        files.append(prepared.linked)
    trainer = None
    if prepared.trainer is not None:
        _warn_of_unsafe_globals(prepared.trainer)
        trainer = _write_trainer(plan, prepared.trainer, fsync)
        nbytes += trainer.nbytes
    return _Written(tuple(files), trainer, nbytes, time.perf_counter() - began, prepared.stall_seconds)


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
    name = f"-{plan.id_in_names}.".join(TRAINER_NAME.split(".")) if plan.id_in_names else TRAINER_NAME
    with create_file(plan.staging / name, len(content), fsync=fsync) as file:
        file.write(content)
    return TrainerFile(name, len(content), xxhash.xxh3_64_hexdigest(content))


# ----------------------------------------------------------------------------------------------------- finish


def finish(
    plan: Plan,
    written: _Written | _Failure,
    shared: SharedContent | None,
    *,
    update_latest: bool = True,
    fsync: bool = True,
) -> SaveReport:
    """Commit what all ranks have written, if all have. Collective.

    Raises:
        CheckpointWriteError: a rank failed; the staging directory is gone.
    """
    outcome: _Committed | _Failure | None = None  # rank 0's, which the others are sent
    commit_all = _commit if len(set(plan.nodes)) == 1 else _prepare_manifest
    try:
        reports = _gather(plan.group, written)
        if plan.rank == 0:
            done = [report for report in reports if isinstance(report, _Written)]
            failed = next((report for report in reports if isinstance(report, _Failure)), None)
            action = partial(commit_all, plan, done, shared, update_latest, fsync)
            outcome = failed if failed is not None else _attempt(0, plan.directory, action)
            if isinstance(outcome, _Failure):
                _abandon(plan)
        decided = _broadcast(plan.group, outcome)
        if isinstance(decided, _Committed) and decided.manifest is not None:
            decided = _commit_on_all_nodes(plan, decided, decided.manifest, update_latest, fsync)
            if isinstance(decided, _Failure):
                _abandon(plan)
    except RuntimeError as error:
        if not isinstance(outcome, _Committed):
            _abandon(plan)
        raise _unreachable(plan.directory, error) from error
    finally:
        if plan.staged is not None:
            plan.staged.release()
    if isinstance(decided, _Failure):
        own = next((mine for mine in (written, outcome) if isinstance(mine, _Failure) and mine == decided), None)
        raise _error(plan, decided) from (own.error if own else None)
    assert decided is not None
    assert isinstance(written, _Written)
    frozen = next((file for file in written.files if file.frozen), None)
    return SaveReport(
        plan.directory,
        plan.step,
        decided.nbytes,
        decided.written_bytes,
        time.perf_counter() - plan.began,
        decided.stall_seconds,
        decided.rank_seconds,
        None if frozen is None else StoredFile(plan.directory / frozen.name, frozen),
    )


def _commit(
    plan: Plan, reports: Sequence[_Written], shared: SharedContent | None, update_latest: bool, fsync: bool
) -> _Committed:
    """On storage that all ranks share: rank 0 does it alone."""
    manifest = _manifest(plan, reports, shared)
    _require_files(plan, manifest, range(plan.world_size))
    content = _write_manifest(plan, manifest, fsync)
    commit.commit(
        plan.staging,
        plan.directory.parent,
        plan.directory.name,
        update_latest=update_latest,
        fsync=fsync,
        files=[MANIFEST_NAME, manifest.trainer.name, *(file.name for file in manifest.files)],
    )
    return _committed(reports, manifest.nbytes + len(content), len(content))


def _prepare_manifest(
    plan: Plan, reports: Sequence[_Written], shared: SharedContent | None, update_latest: bool, fsync: bool
) -> _Committed:
    """Where each node has its own disk: what rank 0 tells all others, before any of them commits."""
    manifest = _manifest(plan, reports, shared)
    text = manifest.to_json()
    return replace(_committed(reports, manifest.nbytes + len(text), len(text)), manifest=text)


def _commit_on_all_nodes(
    plan: Plan, committed: _Committed, text: str, update_latest: bool, fsync: bool
) -> _Committed | _Failure:
    """See [Note: a checkpoint on every node]."""
    manifest = Manifest.from_json(text, MANIFEST_NAME)
    group = plan.group
    assert group is not None
    own_node = [rank for rank, node in enumerate(plan.nodes) if node == plan.nodes[plan.rank]]

    def exchange() -> None:
        files = [
            (manifest.trainer.name, manifest.trainer.nbytes, 0),
            *((f.name, f.nbytes, f.rank) for f in manifest.files),
        ]
        nodes.exchange(
            plan.staging,
            [
                nodes.Transfer(name, nbytes, rank, [to for to in plan.leaders if plan.nodes[to] != plan.nodes[rank]])
                for name, nbytes, rank in files
            ],
            group,
            fsync=fsync,
        )

    def write_manifest() -> None:
        if plan.staged is not None:
            _require_files(plan, manifest, own_node)
            _write_manifest(plan, manifest, fsync)

    def rename() -> None:
        if plan.staged is not None:
            save_dir, tag = plan.directory.parent, plan.directory.name
            commit.commit(plan.staging, save_dir, tag, update_latest=False, fsync=fsync)

    def name() -> None:
        if plan.staged is not None and update_latest:
            commit.write_latest(plan.directory.parent, plan.directory.name, fsync=fsync)

    for step in (exchange, write_manifest, rename, name):
        done = _attempt(plan.rank, plan.directory, step)
        failures = _all_gather(group, done if isinstance(done, _Failure) else None)
        failed = next((failure for failure in failures if failure is not None), None)
        if failed is not None:
            return failed
    return committed


def _manifest(plan: Plan, reports: Sequence[_Written], shared: SharedContent | None) -> Manifest:
    trainer = reports[0].trainer
    if shared is None or trainer is None:
        raise ValueError("rank 0 has to say what the ranks share")
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
        files=tuple(
            sorted((file for report in reports for file in report.files), key=lambda file: (file.frozen, file.rank))
        ),
        trainer=trainer,
    )
    Manifest.from_json(manifest.to_json(), MANIFEST_NAME)  # what can't be loaded must not be committed
    return manifest


def _require_files(plan: Plan, manifest: Manifest, ranks: Container[int]) -> None:
    """Whether this rank sees what those ranks have written."""
    sizes = _sizes(plan.staging)
    for file in manifest.files:
        if file.rank in ranks and sizes.get(file.name) != file.nbytes:
            raise FileNotFoundError(
                f"rank {file.rank} has written {file.nbytes} bytes of {file.name}, and rank {plan.rank} sees "
                f"{sizes.get(file.name, 'no such file')}; all ranks have to save to one shared file system "
                "(or, with a disk of its own on every node, by ZeroCheckpointIO(node_local=True))"
            )


def _write_manifest(plan: Plan, manifest: Manifest, fsync: bool) -> bytes:
    content = manifest.to_json().encode()
    # IMPORTANT: the manifest comes after every file that it lists is durable
    with create_file(plan.staging / MANIFEST_NAME, len(content), fsync=fsync) as new:
        new.write(content)
    return content


def _committed(reports: Sequence[_Written], nbytes: int, manifest_nbytes: int) -> _Committed:
    return _Committed(
        nbytes,
        sum(report.nbytes for report in reports) + manifest_nbytes,
        max(report.stall_seconds for report in reports),
        tuple(report.seconds for report in reports),
    )


def _sizes(directory: Location) -> dict[str, int]:
    """The size of each file in a directory, with as few requests as possible."""
    if is_remote(directory):
        return {
            about["name"].rpartition("/")[2]: about["size"] for about in directory.fs.ls(directory.path, detail=True)
        }
    with os.scandir(directory) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in ("lightning_zero", "lightning"):
        try:
            versions[name] = metadata.version(name.replace("_", "-"))
        except metadata.PackageNotFoundError:  # run from a checkout
            continue
    return versions


# --------------------------------------------------------------------------------------------------- failures


def _attempt(rank: int, where: Location, action: Callable[[], _T]) -> _T | _Failure:
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


def _unreachable(directory: Location, error: RuntimeError) -> CheckpointWriteError:
    """What a group's RuntimeError means: a peer has died, or didn't come within the time-out."""
    return CheckpointWriteError(
        f"{directory} was not saved: this rank waited in vain for the others. A save has to be called on every rank "
        f"(not under `if rank == 0`), at the same place; or a rank has died, or can't be reached any more ({error})"
    )


def _abandon(plan: Plan) -> None:
    """Take the staging directory away, on the rank that made it."""
    if plan.staged is not None:
        plan.staged.abandon()


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
