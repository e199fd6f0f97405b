"""Signals that one rank receives, and on which all ranks act together, between the same two batches.

Lightning 2.6 broadcasts from inside its signal handlers, on the default group and from rank 0. A rank that is told to
stop in the middle of a batch then waits there for rank 0, which waits for that rank's gradients; and rank 0 never
learns that another was told. Its SLURM handler saves in the middle of a batch, when the ranks may be at different
steps. Ctrl+C reaches a rank that waits for another only when that wait is over. So here a handler only takes a note.
Before each batch the ranks agree on the notes, by an all-reduce that was begun a batch ago and has long arrived; and
when the window of accumulated gradients is over, all of them stop (`SIGTERMException`, `KeyboardInterrupt`), or save
and requeue.

A second Ctrl+C interrupts at once, as ever.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info

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
        self._is_alone = group is None
        self._noted = torch.zeros(3, dtype=torch.int32)  # SIGTERM; the number of SLURM's requeue signal; SIGINT
        self._agreed = [0, 0, 0]
        self._agreeing: tuple[dist.Work, torch.Tensor] | None = None
        self.all_stopped = False
        """Every rank was told to stop, and has done so at the same place: they can still do things together."""
        connector: Any = trainer._signal_connector
        self._requeue: Callable[[int, Any], None] = type(connector)._slurm_sigusr_handler_fn.__get__(connector)
        connector._sigterm_notifier_fn = self._on_sigterm
        connector._slurm_sigusr_handler_fn = self._on_requeue
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = self.agree
        else:
            self._group = None  # Lightning before 2.6 has no such place: each rank acts for itself, as ever
        self._on_sigint_before: Any = None

    def watch_interrupts(self) -> None:
        """Take note of SIGINT until `restore`: from the first batch on, when Lightning has registered its handlers.

        It registers whatever was there before it again when the fit ends.
        """
        noted = self._shared or (self._is_alone and self._trainer.state.fn == TrainerFn.FITTING)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if noted and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._on_sigint_before = signal.signal(signal.SIGINT, self._on_sigint)
            if self._is_alone:
                self._trainer.fit_loop.epoch_loop.advance = self._advance_alone  # type: ignore[method-assign,assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_group": None, "_agreeing": None, "_on_sigint_before": None}  # of a copied Trainer

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

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self._noted[2]:
            signal.default_int_handler(signum, frame)
        self._noted[2] = 1
        rank_zero_info("Interrupted: training stops after this batch; interrupt again to stop at once.")

    def restore(self) -> None:
        """Give SIGINT its handler back, and let go of the process group, whose threads end with the last who has it."""
        self._group = self._agreeing = None
        if self._on_sigint_before is not None:
            signal.signal(signal.SIGINT, self._on_sigint_before)
            self._on_sigint_before = None
        self._trainer.fit_loop.epoch_loop.__dict__.pop("advance", None)

    def _advance_alone(self, fetcher: Any) -> None:
        """A batch of a rank that has nobody to agree with. An interrupt stops it before that, SIGTERM Lightning."""
        loop = self._trainer.fit_loop.epoch_loop
        if self._noted[2] and loop.batch_progress.current.ready % self._trainer.accumulate_grad_batches == 0:
            self.all_stopped = True
            raise KeyboardInterrupt
        type(loop).advance(loop, fetcher)

    def act_at_the_end(self) -> None:
        """All is trained on; but whoever was told to stop since isn't to go on behind the fit. A collective."""
        noted = self._noted.clone()
        if self._shared:
            dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        self.all_stopped = bool(noted[0] or noted[2])
        if noted[0] and self._shared:
            self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException
        if noted[2]:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Before a batch: act on what any rank has noted before the last one. A collective."""
        if self._agreeing is not None:
            work, noted = self._agreeing
            work.wait()
            self._agreeing = None
            self._agreed = [max(two) for two in zip(self._agreed, noted.tolist(), strict=True)]
        terminated, requeue, interrupted = self._agreed
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready % self._trainer.accumulate_grad_batches == 0:
            if requeue:
                self._noted[1] = self._agreed[1] = 0
                self._requeue(requeue, None)
            self.all_stopped = bool(terminated or interrupted)
            if terminated:
                self._trainer._signal_connector.received_sigterm = True
                raise SIGTERMException
            if interrupted:
                raise KeyboardInterrupt
        noted = self._noted.clone()
        work = dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._agreeing = work, noted
