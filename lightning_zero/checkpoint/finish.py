"""The end of a save: what all ranks have written becomes a checkpoint, or nothing does."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata

import torch

from lightning_zero.checkpoint import commit, nodes
from lightning_zero.checkpoint.content import SharedContent
from lightning_zero.checkpoint.failures import Failure, all_gather, attempt, broadcast, gather, unreachable
from lightning_zero.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.plan import Plan
from lightning_zero.checkpoint.report import SaveReport, StoredFile, Written
from lightning_zero.checkpoint.storage import Location, create_file, is_remote


@dataclass(frozen=True, slots=True)
class _Committed:
    """What rank 0 tells the others of a checkpoint that is there; with its manifest, if they have to commit it too."""

    nbytes: int
    written_bytes: int
    stall_seconds: float
    rank_seconds: tuple[float, ...]
    manifest: bytes | None = None


def finish(
    plan: Plan,
    written: Written | Failure,
    shared: SharedContent | None,
    *,
    others: Sequence[Written | Failure] = (),
    update_latest: bool = True,
    fsync: bool = True,
) -> SaveReport:
    """Commit what all ranks have written, if all have. Collective.

    Args:
        plan: of the save.
        written: by this rank.
        shared: needed on rank 0.
        others: by the ranks that this process has stood for, if there is no group.
        update_latest: have `latest` name the tag.
        fsync: make each step of the commit durable.

    Raises:
        CheckpointWriteError: a rank failed; the staging directory is gone.
    """
    outcome: _Committed | Failure | None = None  # rank 0's, which the others are sent
    commit_all = _commit if len(set(plan.nodes)) == 1 else _prepare_manifest
    try:
        reports = [*gather(plan.group, written), *others]
        if plan.rank == 0:
            done = [report for report in reports if isinstance(report, Written)]
            failed = next((report for report in reports if isinstance(report, Failure)), None)
            action = partial(commit_all, plan, done, shared, update_latest, fsync)
            outcome = failed if failed is not None else attempt(0, plan.directory, action)
            if isinstance(outcome, Failure):
                plan.abandon()
        decided = broadcast(plan.group, outcome)
        if isinstance(decided, _Committed) and decided.manifest is not None:
            decided = _commit_on_all_nodes(plan, decided, decided.manifest, update_latest, fsync)
            if isinstance(decided, Failure):
                plan.abandon()
    except RuntimeError as error:
        saved = isinstance(outcome, _Committed) and outcome.manifest is None
        if not isinstance(outcome, _Committed):
            plan.abandon()
        raise unreachable(plan.directory, error, saved=saved) from error
    finally:
        if plan.staged is not None:
            plan.staged.release()
    if isinstance(decided, Failure):
        own = next((mine for mine in (written, outcome) if isinstance(mine, Failure) and mine == decided), None)
        raise plan.error(decided) from (own.error if own else None)
    assert decided is not None
    assert isinstance(written, Written)
    frozen = next((file for file in written.files if file.frozen), None)
    return SaveReport(
        plan.directory,
        plan.step,
        decided.nbytes,
        decided.written_bytes,
        time.perf_counter() - plan.began,
        decided.stall_seconds,
        decided.rank_seconds,
        None if frozen is None else StoredFile(plan.directory / frozen.name, frozen, written.links),
    )


def _commit(
    plan: Plan, reports: Sequence[Written], shared: SharedContent | None, update_latest: bool, fsync: bool
) -> _Committed:
    """On storage that all ranks share: rank 0 does it alone."""
    manifest, content = _manifest(plan, reports, shared)
    _require_files(plan, manifest, range(plan.world_size))
    _write_manifest(plan, content, fsync)
    commit.commit(
        plan.staging,
        plan.directory.parent,
        plan.directory.name,
        update_latest=update_latest,
        fsync=fsync,
        files=[MANIFEST_NAME, manifest.trainer.name, *(file.name for file in manifest.files)],
    )
    if plan.staged is not None:
        plan.staged.release()  # before the others hear of it: they find a tag, and nothing of the save
    return _committed(reports, manifest.nbytes + len(content), len(content))


def _prepare_manifest(
    plan: Plan, reports: Sequence[Written], shared: SharedContent | None, update_latest: bool, fsync: bool
) -> _Committed:
    """Where each node has its own disk: what rank 0 tells all others, before any of them commits."""
    manifest, content = _manifest(plan, reports, shared)
    return replace(_committed(reports, manifest.nbytes + len(content), len(content)), manifest=content)


def _commit_on_all_nodes(
    plan: Plan, committed: _Committed, content: bytes, update_latest: bool, fsync: bool
) -> _Committed | Failure:
    """See [Note: a checkpoint on every node]."""
    manifest = Manifest.from_json(content.decode(), MANIFEST_NAME)
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
            _write_manifest(plan, content, fsync)

    def rename() -> None:
        if plan.staged is not None:
            save_dir, tag = plan.directory.parent, plan.directory.name
            commit.commit(plan.staging, save_dir, tag, update_latest=False, fsync=fsync)
            plan.staged.release()

    def name() -> None:
        if plan.staged is not None and update_latest:
            commit.write_latest(plan.directory.parent, plan.directory.name, fsync=fsync)

    for step in (exchange, write_manifest, rename, name):
        done = attempt(plan.rank, plan.directory, step)
        failures = all_gather(group, done if isinstance(done, Failure) else None)
        failed = next((failure for failure in failures if failure is not None), None)
        if failed is not None:
            return failed
    return committed


def _manifest(plan: Plan, reports: Sequence[Written], shared: SharedContent | None) -> tuple[Manifest, bytes]:
    """The manifest, and the bytes of its file."""
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
        created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        versions=_versions(),
        entries=tuple(shared.entries),
        aliases=dict(shared.aliases),
        optimizers=tuple(shared.optimizers),
        files=tuple(
            sorted((file for report in reports for file in report.files), key=lambda file: (file.frozen, file.rank))
        ),
        trainer=trainer,
    )
    text = manifest.to_json()
    Manifest.from_json(text, MANIFEST_NAME)  # what can't be loaded must not be committed
    return manifest, text.encode()


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


def _write_manifest(plan: Plan, content: bytes, fsync: bool) -> None:
    # IMPORTANT: the manifest comes after every file that it lists is durable
    with create_file(plan.staging / MANIFEST_NAME, len(content), fsync=fsync) as new:
        new.write(content)


def _committed(reports: Sequence[Written], nbytes: int, manifest_nbytes: int) -> _Committed:
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
