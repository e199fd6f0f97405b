"""What a resumed run still has to do when its checkpoint is read: everything that is one rank's own.

[Note: when random states are restored]
A resumed run must draw the numbers that the uninterrupted one would have drawn, and makes its data loaders and their
iterators anew on the way.

| the checkpoint was saved    | its iterator was made      | so the states are restored                          |
|-----------------------------|----------------------------|-----------------------------------------------------|
| in the middle of an epoch   | before                     | when all iterators are there (`when_all_are_made`); |
|                             |                            | a loader's own when its order has been drawn        |
| at an epoch's end           | after, for the next epoch  | between loader and iterator (`between`); where two  |
|                             |                            | were made, before a third (`when_all_are_made`)     |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch.nn import Module

from lightning_zero.checkpoint.trust import unpickle
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint
from lightning_zero.plugin.data_order import has_state, order_of, set_generator_states
from lightning_zero.plugin.loader_state import (
    Iterators,
    dont_restart,
    draw_seeds_of_later_loaders,
    finish_epochs,
    forget_untrained_batch,
    is_at_epochs_end,
    is_over,
    next_epoch,
    reopen_epoch,
)
from lightning_zero.plugin.metric_state import MetricState, set_metric_states
from lightning_zero.plugin.random_state import set_random_state


def let_lightning_decide(loop: _Loop) -> None:
    """Whether to validate: see `Resume.pass_over_validation`."""
    loop.__dict__.pop("_should_check_val_fx", None)


class Resume:
    """One rank's way back into training. Loops are put into the checkpoint at once; the rest waits for its time.

    Args:
        checkpoint: as it was loaded; its `loops` become this rank's.
        rank: this rank.
        world_size: of how many.
        by_steps: whether `max_steps` is set.
        weights_only: refuse whatever would run code.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        *,
        rank: int,
        world_size: int,
        by_steps: bool,
        weights_only: bool,
    ) -> None:
        def of(saved_by: int) -> dict[str, Any]:
            stored = checkpoint.source.rank_state(saved_by)
            return {} if stored is None else unpickle(stored, f"the state of rank {saved_by}", weights_only)

        manifest = checkpoint.source.manifest
        self.state_bytes: Counter[str] = Counter()
        """Of the optimizers' states of each parameter, by name, all ranks' together."""
        for tensor in (tensor for file in manifest.files for tensor in file.tensors if tensor.kind == "optimizer"):
            self.state_bytes[tensor.name] += tensor.nbytes
        own, saved_by = of(rank), manifest.world_size
        if own and saved_by == world_size and own.get("loops") is not None:
            checkpoint["loops"] = own["loops"]
        self._random_state: dict[str, Any] | None = own.get("random")
        alike = saved_by == world_size
        self._loaders: list[dict[str, Any]] = own.get("loaders", []) if alike else []
        logged = (own or of(0)).get("logged", {})
        self.logged: dict[str, Any] = {key: logged[key] for key in logged if alike or key != "sums"}
        """What was logged: see `logged_metrics`."""
        self._begun = 0
        loops = checkpoint.get("loops", {})
        forget_untrained_batch(loops)
        progress = loops.get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        self._batches: int = progress.get("current", {}).get("processed", 0)
        epoch = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
        begun = progress.get("current", {}).get("ready", 0) > 0 or epoch.get("started", 0) > epoch.get("processed", 0)
        self.in_mid_epoch: bool = begun and not is_at_epochs_end(loops)
        """The checkpoint's epoch was begun, and isn't over."""
        others = [of(other) for other in range(rank + world_size, saved_by, world_size)]
        self._metrics: list[dict[str, MetricState]] = [state.get("metrics", {}) for state in (own, *others) if state]
        self._metrics_of_first: dict[str, MetricState] = (own if rank == 0 else of(0)).get("metrics", {})
        self._on_more_ranks = world_size > saved_by
        loaders = (own or of(0)).get("loaders", [])
        with_states = bool(loops.get("fit_loop", {}).get("state_dict", {}).get("combined_loader"))
        in_the_fit = epoch.get("completed", 0) < epoch.get("processed", 0)  # behind it, states are others by now
        if loaders and ((with_states and in_the_fit) or all("drawn_from" in loader for loader in loaders)):
            reopen_epoch(loops)
        self._begins_an_epoch = is_over(loops)
        self._iterators: Iterators = finish_epochs(loops, by_steps=by_steps and not self._begins_an_epoch)
        self._epoch = next_epoch(loops)
        hooks_are_left = progress.get("current", {}).get("completed", 0) < self._batches
        self._at_last_batch = is_at_epochs_end(loops) and hooks_are_left
        self._is_between_batches = not hooks_are_left and own.get("validating") is False
        self._all_batches: int = progress.get("total", {}).get("ready", 0)

    def restore_metrics(self, module: Module) -> None:
        """Let the module's metrics go on, when the module's own state has been loaded."""
        set_metric_states(module, self._metrics, self._metrics_of_first, on_more_ranks=self._on_more_ranks)

    def when_loops_are_restored(self, fit_loop: _Loop) -> None:
        """Lightning has given them their state, and hasn't made use of it."""
        if self._begins_an_epoch:
            dont_restart(fit_loop)

    def set_epoch(self, loader: object) -> None:
        """Let samplers know which epoch comes, before a loader's workers have drawn its first batches."""
        _set_sampler_epoch(loader, self._epoch)

    def between(self, loader: object) -> None:
        """A training loader is there, and its iterator isn't."""
        self.set_epoch(loader)
        state = self._loaders[self._begun % len(self._loaders)] if self._loaders else None
        self._begun += 1
        if not self.in_mid_epoch:
            set_generator_states(loader, state["generators"] if state else ())
            self._restore_random_state()
        elif (order := order_of(loader)) is not None:
            order.resume(state if state and "drawn_from" in state else None, self._batches)  # it may be another loader

    def when_all_are_made(self, loaders: Sequence[Any], make_again: Callable[[], object]) -> None:
        """The iterators are there."""
        # A persistent one draws its seed once, and not for each epoch
        again = self._iterators == "two" or any(getattr(loader, "persistent_workers", False) for loader in loaders)
        if self.in_mid_epoch or again or self._iterators != "one":
            self._restore_random_state()
        if not self.in_mid_epoch and (again or self._iterators != "one"):
            self._set_generators(loaders)
            if again and self._random_state is not None:
                make_again()

    def pass_over_validation(self, trainer: Trainer) -> None:
        """Let Lightning pass over the validation that came after an epoch's last batch, if one did.

        It makes an iterator for it, which draws a number, but only one where it has several loaders, each after the
        other; and it asks the epoch that comes whether there is a validation. Between two batches all that came of the
        first is done; Lightning takes a validation there for one that has just ended, counts a step for the loggers,
        and steps a plateau's scheduler, both a second time.
        """
        loop, every_epoch, every = trainer.fit_loop.epoch_loop, trainer.check_val_every_n_epoch, trainer.val_check_batch
        by_time = getattr(trainer, "_val_check_time_interval", None) is not None
        if not loop.restarting or by_time or every is None or not (self._at_last_batch or self._is_between_batches):
            return
        done = self._batches if every_epoch is not None else self._all_batches
        in_this_epoch = trainer.enable_validation and (every_epoch is None or self._epoch % every_epoch == 0)
        due = self._at_last_batch and in_this_epoch and (math.isinf(every) or done % every == 0)

        def was_due(_: object) -> bool:
            let_lightning_decide(loop)
            if due:
                draw_seeds_of_later_loaders(loop.val_loop)
            return due

        loop.__dict__["_should_check_val_fx"] = was_due

    def when_first_batch_is_there(self, loaders: Sequence[Any]) -> None:
        """Loaders with a state have drawn their order."""
        if self.in_mid_epoch:
            self._set_generators(loaders, of=has_state)

    def _set_generators(self, loaders: Sequence[Any], of: Callable[[Any], bool] = lambda loader: True) -> None:
        for loader, state in zip(loaders, self._loaders, strict=False):
            if of(loader):
                set_generator_states(loader, state["generators"])

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
