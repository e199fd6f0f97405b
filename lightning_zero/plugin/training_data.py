"""The training loaders of a fit: what is noted of them, what a checkpoint keeps of that, and the way back to there.

How one loader's order is drawn again is `data_order`'s, when random states are restored is `resume`'s.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_zero.plugin.data_order import generator_states, goes_on, note_order, order_of
from lightning_zero.plugin.loader_state import make_resumable
from lightning_zero.plugin.logged_metrics import set_logged
from lightning_zero.plugin.resume import Resume, let_lightning_decide


class TrainingData:
    """One rank's, of one fit after the other."""

    def __init__(self) -> None:
        self.resume: Resume | None = None
        """Where the fit that is being set up goes on, until its training starts."""
        self._resumed: Resume | None = None
        self._left: list[dict[str, Any]] | None = None

    def forget(self) -> None:
        """A fit that was stopped before it began leaves nothing to the next."""
        self.resume = self._resumed = None

    def enter(self) -> None:
        """A fit begins."""
        self._left = None

    def note(self, loader: object, trainer: Trainer) -> None:
        """A loader is there, and its iterator isn't: see [Note: when random states are restored]."""
        make_resumable(loader)
        if trainer.training:
            note_order(loader, lambda: trainer.training)
            if self.resume is not None:
                self.resume.between(loader)
            elif self._resumed is not None:  # one that is loaded again with each epoch
                self._resumed.set_epoch(loader)

    def load_states(self, trainer: Trainer) -> None:
        """The loops know where they were: loaders that were made early, for an estimate of the steps, learn it now."""
        loop, resume = trainer.fit_loop, self.resume
        if resume is not None:
            resume.when_loops_are_restored(loop)
        if resume is not None and loop._combined_loader is not None and loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            for loader in _training_loaders(trainer):
                resume.between(loader)
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)

    def start(self, trainer: Trainer) -> None:
        """The iterators are there: see [Note: when random states are restored]."""
        self._resumed, self.resume = self.resume, None
        if self._resumed is None:
            return
        callbacks: list[Any] = vars(trainer)["callbacks"]
        for callback in callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                # It acts when an epoch begins, and Lightning goes on in one without telling anybody
                callback.on_train_epoch_start(trainer)
        set_logged(trainer, self._resumed.logged, in_mid_epoch=self._resumed.in_mid_epoch)
        loaders = _training_loaders(trainer)
        self._resumed.when_all_are_made(loaders, partial(iter, trainer.fit_loop._data_fetcher))
        self._resumed.pass_over_validation(trainer)
        if not self._resumed.in_mid_epoch or all(map(goes_on, loaders)):
            # Lightning looks for loaders with a state, and tells an epoch's end by how many batches there are now
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable", PossibleUserWarning)

    def start_batch(self, trainer: Trainer) -> None:
        """A batch is there."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            if resumed.in_mid_epoch and "sums" in resumed.logged:
                # Else Lightning would step no plateau's scheduler at this epoch's end, for want of metrics
                trainer.fit_loop._restarting = False
            resumed.when_first_batch_is_there(_training_loaders(trainer))

    def where(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Where each training loader is, or was when the fit was left, as a checkpoint keeps it."""
        if self._left is not None:
            return self._left
        loop = trainer.fit_loop
        again = loop._combined_loader is not None and loop._combined_loader._mode == "max_size_cycle"
        batches = getattr(loop.epoch_loop.batch_progress.current, "processed", 0)
        return [
            {"generators": generator_states(loader)} if order is None else order.state(batches, begins_again=again)
            for loader, order in ((loader, order_of(loader)) for loader in _training_loaders(trainer))
        ]

    def leave(self, trainer: Trainer) -> None:
        """The fit is over: a save that comes still finds where it was, and the user's loaders are as they were."""
        self._left = self.where(trainer)
        let_lightning_decide(trainer.fit_loop.epoch_loop)
        for order in map(order_of, _training_loaders(trainer)):
            if order is not None:
                order.put_back()


def _training_loaders(trainer: Trainer) -> list[Any]:
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else loader.flattened
