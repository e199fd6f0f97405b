"""The saves of one strategy: when they go on behind training, who waits for them, and what they cost."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_zero.checkpoint.commit import remove_tag
from lightning_zero.checkpoint.content import RankContent, SharedContent
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.nodes import Place
from lightning_zero.checkpoint.plan import TagValidation
from lightning_zero.checkpoint.save import holds_model
from lightning_zero.checkpoint.storage import Location, absolute, is_remote, locate, require_writable
from lightning_zero.errors import ZeroError
from lightning_zero.plugin.checkpoint_io import PREPARED, PreparedSave, ZeroCheckpointIO
from lightning_zero.plugin.ranks import Ranks
from lightning_zero.plugin.savers import OTHER, Savers
from lightning_zero.plugin.telemetry import SaveTelemetry
from lightning_zero.plugin.wrapped_io import unwrapped, wait_for_threads

if TYPE_CHECKING:
    from lightning_zero.plugin.strategy import ZeroStrategy


class Saves:
    """What the ranks of a strategy save together, and what its callbacks ask of that: `trainer.strategy.saves`.

    Args:
        strategy: whose ranks save.
        ranks: they.
        tag_validation: what to do where they are given different tags, if a save doesn't say.
    """

    def __init__(self, strategy: ZeroStrategy, ranks: Ranks, tag_validation: TagValidation) -> None:
        self._strategy = strategy
        self._ranks = ranks
        self.tag_validation: TagValidation = tag_validation
        self.listeners: list[Callable[[Location], object]] = []
        """Told of every checkpoint that is saved, when it is there: perhaps by another thread."""
        self.savers = Savers()
        """On ranks that tend a save directory."""
        self._asked_by = OTHER
        self._last: Location | None = None
        self._asked_behind: bool | None = None
        self._reserve_due = False
        self._telemetry = SaveTelemetry()

    # --- where to ---

    @property
    def io(self) -> ZeroCheckpointIO | None:
        """The one that writes directories, whatever is wrapped around it; None if the user's own writes files."""
        return unwrapped(self._strategy.checkpoint_io)

    @property
    def sharded_io(self) -> CheckpointIO:
        """What writes and reads directories, whatever the user's own writes."""
        return self._strategy.checkpoint_io if self.writes_directories else ZeroCheckpointIO()

    @property
    def writes_directories(self) -> bool:
        """Whether checkpoints are directories, and not whole files by a CheckpointIO of the user's."""
        return self.io is not None

    @property
    def are_node_local(self) -> bool:
        """Whether every node has a save directory of its own."""
        return self.io is not None and self.io.node_local

    @property
    def tends_directory(self) -> bool:
        """Whether this rank removes and renames what is in its node's save directory."""
        return self._strategy.is_global_zero or (self.are_node_local and self._strategy.local_rank == 0)

    def require_writable(self, directory: Location) -> None:
        """A fit that has nowhere to save to is to end when it begins. Called on every rank.

        Raises:
            CheckpointWriteError: nothing can be written there.
        """
        self._ranks.all_or_none(partial(require_writable, directory) if self.tends_directory else lambda: None)

    # --- a save ---

    def save(
        self,
        checkpoint: dict[str, Any] | Callable[[], dict[str, Any]],
        path: _PATH,
        storage_options: Any | None = None,
        *,
        update_latest: bool,
        io: CheckpointIO | None = None,
        behind: bool | None = None,
        tag_validation: TagValidation | None = None,
    ) -> None:
        """Save a directory. Called on every rank.

        Args:
            checkpoint: Lightning's dict; or what makes it, whose errors all ranks then raise.
            path: of the tag.
            storage_options: for a `CheckpointIO` around ours.
            update_latest: let `latest` name it.
            io: what saves it; the strategy's by default.
            behind: go on with training meanwhile; as `asked_by` or the `CheckpointIO` says by default.
            tag_validation: what to do where the ranks were given different tags.

        Raises:
            ZeroError: a rank couldn't save its part, the same on all; nothing has changed.
        """
        began = time.perf_counter()
        if behind is None:
            behind = self._are_behind and "hpc_ckpt_" not in os.fspath(path)  # the job is requeued right after it
        # After a fit in spawned processes, the one that is left has the weights, and no process group.
        group = self._ranks.control if dist.is_initialized() else None
        saved = absolute(locate(path))
        if self.tends_directory and not saved.name.startswith("."):
            self.savers.note(saved, self._asked_by)
        dumped: dict[str, Any] = {}
        content: RankContent | Exception
        try:
            dumped.update(checkpoint() if callable(checkpoint) else checkpoint)
            content, shared = self._strategy.contents(dumped, path)
        except Exception as error:  # of this rank alone, perhaps: the others learn of it when they meet
            content, shared = error, None
        prepared = PreparedSave(
            content,
            shared,
            group,
            update_latest=update_latest,
            behind=behind,
            group_behind=self._ranks.behind if behind and group is not None else None,
            tag_validation=tag_validation or self.tag_validation,
            place=Place(self._strategy.node_rank, self._strategy.local_rank == 0) if group is not None else None,
            began=began,
        )
        io = io or self._strategy.checkpoint_io
        io.save_checkpoint({**dumped, PREPARED: prepared}, path, storage_options=storage_options)
        wait_for_threads(self._strategy.checkpoint_io)
        self.log()
        if not saved.name.startswith("."):
            self._last = saved
            for listener in self.listeners:
                self.after_commit(partial(listener, saved))

    @property
    def _are_behind(self) -> bool:
        """Whether a save is to go on behind training: only while there is training."""
        trainer = self._strategy.trainer_if_any
        if self.io is None or trainer is None:
            return False
        asked = self.io.async_save if self._asked_behind is None else self._asked_behind
        return asked and trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING

    @contextmanager
    def asked_by(self, saver: str, *, behind: bool | None) -> Generator[None]:
        """Around the saves of a callback.

        Args:
            saver: what it is called: see `Savers`.
            behind: have them go on behind training, or not, whatever the CheckpointIO's own setting; None: that.
        """
        before, (self._asked_by, self._asked_behind) = (self._asked_by, self._asked_behind), (saver, behind)
        try:
            yield
        finally:
            self._asked_by, self._asked_behind = before

    def export(
        self, checkpoint: Mapping[str, Any], path: Location, write: Callable[[Checkpoint, dict[str, Any]], object]
    ) -> None:
        """Have rank 0 write a file of the model as it is now. Called on every rank, which wait for it.

        The way leads over a sharded checkpoint, so that no rank ever holds a second copy of the model: the last one
        that was saved, if it holds just these bytes; else one of the weights alone, beside the file.

        Args:
            checkpoint: Lightning's dict.
            path: of the file.
            write: gets the checkpoint, and Lightning's dict without its tensors; called on rank 0.
        """
        weights = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
        rest: dict[str, Any] = {}

        def look() -> list[bool]:
            self.join()
            content, shared = self._strategy.contents(weights, str(path))
            rest.update(apply_to_collection(shared.trainer, Tensor, Tensor.cpu))
            return [self._last_holds(content, shared)]

        answers: list[bool] = self._ranks.everyones(look)
        saved = all(answers)
        shards = path.parent / f".{path.name}.shards" / ".weights"
        source = self._last if saved and self._last is not None else shards

        def write_first() -> None:
            write(Checkpoint(source, check_reads=True), rest)

        try:
            if not saved:
                self.save(weights, str(shards), update_latest=False, io=self.sharded_io, behind=False)
            self._ranks.done_by_first(write_first)
        finally:
            if not saved and self.tends_directory:
                _remove_temporary(shards)

    def _last_holds(self, content: RankContent, shared: SharedContent) -> bool:
        """Whether the last checkpoint that was saved holds this rank's part of the model as it is now."""
        if self._last is None:
            return False
        try:
            manifest = Checkpoint(self._last).manifest
        except (ZeroError, OSError):  # it has been removed
            return False
        return manifest.step == content.step and holds_model(manifest, self._ranks.rank, content, shared)

    # --- one that is under way ---

    def begin_fit(self) -> None:
        """The iterators are there, and training begins. A collective."""
        self._telemetry = SaveTelemetry()
        if self.io is not None and self.io.async_save:
            self.expect_behind()

    def expect_behind(self) -> None:
        """Get ready for saves behind training, so that the first needn't wait longer than the others. A collective."""
        if self.io is not None:
            if self._ranks.count > 1:
                _ = self._ranks.behind
            self._reserve_due = True  # when the optimizers have their states

    def before_step(self) -> None:
        """Before anything changes what a snapshot may still be copying: see `Snapshot.fence`."""
        if self.io is not None:
            self.io.before_step()

    def after_step(self) -> None:
        """The optimizers have their states."""
        if self._reserve_due and self.io is not None:
            self.io.reserve(self._strategy.snapshot_bytes(), pinned=self._strategy.root_device.type == "cuda")
        self._reserve_due = False

    def after_commit(self, action: Callable[[], object]) -> None:
        """Do something when the checkpoint that is being saved is there; at once, if none is; not, if it fails."""
        if self.io is not None:
            self.io.after_commit(action)
        else:
            action()

    def is_under_way(self, path: _PATH) -> bool:
        """Whether a save of this very path goes on behind training."""
        return self.io is not None and self.io.is_being_saved(path)

    def wait(self) -> None:
        """Wait until the save that is under way is committed. Called on every rank.

        Raises:
            CheckpointWriteError: it failed, on any of them.
        """
        self._ranks.all_or_none(self.join)

    def join(self) -> None:
        """Wait for this rank's part in the save that is under way, and raise what went wrong with it."""
        if self.io is not None:
            try:
                self.io.join()
            finally:
                self.log()

    def join_quietly(self) -> None:
        """While another exception is on its way: wait, and say what went wrong."""
        try:
            self.join()
        except Exception as error:
            warnings.warn(f"the save that was under way failed too: {error}", stacklevel=2)

    # --- what they cost ---

    def log(self) -> None:
        """Tell of the saves that were done since this was last called."""
        trainer = self._strategy.trainer_if_any
        for report in self.io.take_reports() if self.io is not None else ():
            passing = report.path.name.startswith(".")  # an export's, or `lr_find`'s
            if self._strategy.is_global_zero and trainer is not None and not passing:
                self._telemetry.log(report, trainer.loggers)

    @property
    def history(self) -> Sequence[Mapping[str, float]]:
        """On rank 0: what each of the newest saves of this fit cost, as it was logged: see `SaveTelemetry`."""
        return self._telemetry.history


def _remove_temporary(shards: Location) -> None:
    if not is_remote(shards):
        shutil.rmtree(shards.parent, ignore_errors=True)
        return
    try:
        remove_tag(shards.parent, shards.name)
    except Exception as error:  # a store's own kinds too; what these shards were for is written
        rank_zero_warn(f"{shards.parent} couldn't be removed, and nothing needs it any more: {error}")
