"""A save that all ranks have agreed on: the tag, the step, and where the files go first."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch.distributed as dist

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.content import RankContent
from lightning_zero.checkpoint.failures import Failure, attempt, begin_all_gather, unreachable
from lightning_zero.checkpoint.nodes import Place
from lightning_zero.checkpoint.storage import Location, absolute, is_remote
from lightning_zero.errors import CheckpointWriteError, TagMismatchError

_T = TypeVar("_T")

TagValidation = Literal["fail", "warn", "ignore"]


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

    def abandon(self) -> None:
        """Take away what was written, on the rank that made the staging directory."""
        if self.staged is not None:
            self.staged.abandon()

    def error(self, failure: Failure) -> CheckpointWriteError:
        """What every rank raises: the tag and not the path, since each may spell that in its own way."""
        return CheckpointWriteError(
            f"the checkpoint {self.directory.name!r} was not saved: {failure.text}. "
            "Earlier checkpoints are as they were"
        )


class Proposal:
    """The first half of the ranks' agreement: what each was asked to save is on its way to the others.

    To make one, on every rank, makes the staging directory and begins the exchange. Each does what else it has to, and
    then all ask what is `agreed`, which waits for the others.

    Args:
        directory: the tag's. Its staging directory is made.
        content: what this rank puts in, or why it can't.
        group: the ranks; None for a single process.
        tag_validation: what to do where the ranks were given different tags: `fail`; or take rank 0's, and `warn` of
            it, or `ignore` it. The steps have to be the same in any case.
        place: where this rank is, if every node has its own disk.
        clean: remove what dead saves have left, first.
        began: when the save did, by `time.perf_counter()`; now, if not given.

    Raises:
        CheckpointWriteError: the others don't come.
    """

    def __init__(
        self,
        directory: Location,
        content: RankContent | Exception,
        group: dist.ProcessGroup | None,
        *,
        tag_validation: TagValidation = "fail",
        place: Place | None = None,
        clean: bool = True,
        began: float | None = None,
    ) -> None:
        self._began = time.perf_counter() if began is None else began
        self._directory = absolute(directory)
        self._group, self._tag_validation = group, tag_validation
        self.rank, self._world_size = (group.rank(), group.size()) if group is not None else (0, 1)
        self._place = Place(0, self.rank == 0) if place is None else place
        token = secrets.token_hex(8) if self._place.leads else ""
        prepare = partial(_prepare_directory, self._directory, content, token, clean)
        self._staged = attempt(self.rank, self._directory, prepare)
        failure = self._staged if isinstance(self._staged, Failure) else None
        self._step = -1 if isinstance(content, Exception) else content.step
        said = self._directory.name, self._step, self._place.node, token, failure
        with abandoning(self):
            self._arrive = self._reaching_all(partial(begin_all_gather, group, said))

    def _reaching_all(self, do: Callable[[], _T]) -> _T:
        try:
            return do()
        except RuntimeError as error:
            raise unreachable(self._directory, error) from error

    def abandon(self) -> None:
        """Take away the staging directory, on the rank that made it."""
        if isinstance(self._staged, commit.Staging):
            self._staged.abandon()

    def agreed(self) -> Plan:
        """Make sure that all ranks save the same. To be called `abandoning` the proposal.

        Raises:
            TagMismatchError: they don't.
            CheckpointWriteError: the directory can't be made, or a rank has nothing to put in, or doesn't come.
        """
        answers = self._reaching_all(self._arrive)
        directory = self._directory
        wanted = [(tag, step) for tag, step, *_ in answers]
        nodes, tokens = tuple(node for _, _, node, *_ in answers), [token for *_, token, _ in answers]
        leaders = tuple(rank for rank, token in enumerate(tokens) if token)
        differ = len({tag for tag, _ in wanted}) > 1
        if differ and self._tag_validation != "fail":
            directory = directory.parent / wanted[0][0]
        leader = next(leader for leader in leaders if nodes[leader] == self._place.node)
        # Named after the tag that the leader was given, whatever they have agreed on
        staging = commit.staging_directory(directory.parent, wanted[leader][0], tokens[leader])
        failure, staged = (self._staged, None) if isinstance(self._staged, Failure) else (None, self._staged)
        plan = Plan(
            directory,
            staging,
            tokens[0],
            self._step,
            self.rank,
            self._world_size,
            self._group,
            staged,
            nodes,
            leaders,
            self._began,
        )
        failed = next((found for *_, found in answers if found is not None), None)
        if failed is not None:
            raise plan.error(failed) from (failure.error if failure is not None and failure == failed else None)
        if (differ and self._tag_validation == "fail") or len({step for _, step in wanted}) > 1:
            raise TagMismatchError(
                f"the ranks were asked to save different things ({_list_wanted(wanted)}). "
                "Every rank has to save the same tag at the same step"
            )
        if differ and self._tag_validation == "warn":
            warnings.warn(
                f"rank 0's tag is saved, of different ones ({_list_wanted(wanted)}). A metric in a file name is each "
                "rank's own, unless it is logged with sync_dist=True",
                stacklevel=2,
            )
        return plan


@contextmanager
def abandoning(save: Proposal | Plan) -> Iterator[None]:
    """Whatever is raised, an interrupt too, takes away what was written: the process may live on, and hold its lock."""
    try:
        yield
    except BaseException:
        save.abandon()
        raise


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
    commit.require_own_latest(directory.parent)
    if clean:
        commit.clean_leftovers(directory.parent)
    return commit.Staging(commit.staging_directory(directory.parent, directory.name, token), token)
