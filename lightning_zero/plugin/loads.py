"""The loads of one strategy: which checkpoint all its ranks take, and what each of them reads of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule

from lightning_zero.checkpoint.storage import is_remote
from lightning_zero.errors import CheckpointNotFoundError, TagMismatchError
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint, weights_option
from lightning_zero.plugin.choice import Choice, choose
from lightning_zero.plugin.loading import read_together
from lightning_zero.plugin.ranks import Ranks

if TYPE_CHECKING:
    from lightning_zero.plugin.strategy import ZeroStrategy


class Loads:
    """What the ranks of a strategy load together: called on every rank.

    Args:
        strategy: whose ranks load.
        ranks: they.
    """

    def __init__(self, strategy: ZeroStrategy, ranks: Ranks) -> None:
        self._strategy = strategy
        self._ranks = ranks
        self._is_start_known = False

    def begin(self) -> None:
        """A Trainer begins to fit, validate, test or predict, perhaps with a checkpoint."""
        self._is_start_known = False

    def require_same_start(self, path: _PATH | None) -> None:
        """Each rank has looked for itself whether there is a checkpoint to load: they have to see the same.

        Lightning loads it before it calls `setup`, and says nowhere else that there is one. Only the first
        call of a run compares.

        Raises:
            CheckpointNotFoundError: some ranks have a checkpoint, and some none.
        """
        asked, self._is_start_known = self._is_start_known, True
        if asked or self._ranks.count == 1:
            return
        seen = self._ranks.everyones(lambda: [(path, f"rank {self._ranks.rank} on {socket.gethostname()}")])
        without = [where for path, where in seen if not path]
        if without and len(without) < len(seen):
            found = next(path for path, _ in seen if path)
            raise CheckpointNotFoundError(
                f"some ranks found {found} to load, and there is nothing for {', '.join(without[:8])}: copy the "
                "directory there, or give every rank the same ckpt_path"
            )

    def require_same(self, asked: dict[str, object]) -> None:
        """All ranks have to load the same, when the save that is under way is there.

        Args:
            asked: of this rank: each argument's name and value.

        Raises:
            TagMismatchError: they aren't asked to.
            CheckpointWriteError: the save has failed, on any rank.
        """

        def say() -> list[str]:
            self._strategy.saves.join()
            return [", ".join(f"{name}={value!r}" for name, value in asked.items())]

        said = self._ranks.everyones(say)
        other = next((rank for rank, theirs in enumerate(said) if theirs != said[0]), None)
        if other is not None:
            raise TagMismatchError(
                f"the ranks were asked to load different things: rank 0 {said[0]}; rank {other} {said[other]}. "
                "Give every rank the same arguments"
            )

    def choose(self, path: _PATH, tag: str | None = None, *, required: bool = False) -> Choice | None:
        """A checkpoint that is sound for all ranks, which look at it as deep as the `CheckpointIO` says: see `choice`.

        Args:
            path: the save directory, or a tag's.
            tag: of the save directory.
            required: a directory without a checkpoint is an error; else there is None.
        """
        saves, where, share = self._strategy.saves, f"rank {self._ranks.rank}", (self._ranks.rank, self._ranks.count)
        if saves.are_node_local:
            where += f" on {socket.gethostname()}, which needs the directory whole (another node has it)"
            share = self._strategy.local_rank, self._strategy.num_processes
        verify = "sizes" if saves.io is None else saves.io.verify
        return choose(self._ranks, path, tag, verify=verify, share=share, where=where, required=required)

    def read(self, choice: Choice, weights_only: bool | None) -> dict[str, Any]:
        """Lightning's dict, its tensors unread. All ranks have looked at the files: none has to look at all of them."""
        saves = self._strategy.saves
        with nullcontext() if saves.io is None else saves.io.loading_verified(choice.manifest):
            return saves.sharded_io.load_checkpoint(choice.path, **weights_option(weights_only))

    def state_dict(self, checkpoint: Mapping[str, Any], module: LightningModule) -> Mapping[str, Any]:
        """The module's state dict; from behind a URL it is in the module already."""
        state_dict: Mapping[str, Any] = checkpoint["state_dict"]
        if not isinstance(checkpoint, LoadedCheckpoint) or not is_remote(checkpoint.source.directory):
            return state_dict
        return state_dict if self._ranks.count == 1 else read_together(module, state_dict, self._ranks)
