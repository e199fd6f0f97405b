"""Signals that one rank receives, and on which all ranks act together, between the same two batches.

Lightning 2.6 broadcasts from inside its signal handlers, on the default group and from rank 0. A rank that is told to
stop in the middle of a batch then waits there for rank 0, which waits for that rank's gradients; and rank 0 never
learns that another was told. Its SLURM handler saves in the middle of a batch, when the ranks may be at different
steps. So here a handler only takes a note. Before each batch the ranks agree on the notes, by an all-reduce that was
begun a batch ago and has long arrived; then all of them stop (`SIGTERMException`), or save and requeue, at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

_log = logging.getLogger(__name__)


class SharedSignals:
    """What the ranks were told by signals: to be installed before Lightning registers its handlers.

    Args:
        trainer: whose handlers are replaced.
        group: in which the ranks agree; None for a rank that is alone.
    """

    def __init__(self, trainer: Trainer, group: dist.ProcessGroup | None) -> None:
        self._trainer = trainer
        self._group = group
        self._noted = torch.zeros(2, dtype=torch.int32)  # SIGTERM; the number of SLURM's requeue signal
        self._agreeing: tuple[dist.Work, torch.Tensor] | None = None
        self.all_stopped = False
        """Every rank has raised `SIGTERMException` at the same place: they can still do things together."""
        connector: Any = trainer._signal_connector
        self._requeue: Callable[[int, Any], None] = type(connector)._slurm_sigusr_handler_fn.__get__(connector)
        connector._sigterm_notifier_fn = self._on_sigterm
        connector._slurm_sigusr_handler_fn = self._on_requeue
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = self.agree

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_group": None, "_agreeing": None}  # somebody copies the Trainer

    @property
    def _shared(self) -> bool:
        return self._group is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _on_sigterm(self, signum: int, _: Any) -> None:
        connector = self._trainer._signal_connector
        _log.info("[rank: %d] received SIGTERM", self._trainer.global_rank)
        first = not (self._noted[0] or connector.received_sigterm)
        launcher = self._trainer.strategy.launcher
        if first and launcher is not None:
            launcher.kill(signum)
        if self._shared:
            self._noted[0] = 1
        else:
            connector.received_sigterm = True

    def _on_requeue(self, signum: int, frame: Any) -> None:
        if self._shared:
            self._noted[1] = int(signum)
        else:
            self._requeue(signum, frame)

    def release(self) -> None:
        """Let go of the process group."""
        self._group = self._agreeing = None

    def agree(self) -> None:
        """Before a batch: act on what any rank has noted before the last one. A collective."""
        if self._agreeing is not None:
            work, noted = self._agreeing
            work.wait()
            terminated, requeue = noted.tolist()
            if requeue:
                self._noted[1] = 0
                self._agreeing = None
                self._requeue(requeue, None)
            if terminated:
                self._agreeing = None
                self.all_stopped = True
                self._trainer._signal_connector.received_sigterm = True
                raise SIGTERMException
        noted = self._noted.clone()
        work = dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._agreeing = work, noted
