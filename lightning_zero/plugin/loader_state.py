"""Data loaders that go on exactly where they were: what Lightning and torchdata leave open between them.

Five things, each measured with Lightning 2.6 and torchdata 0.11, and each wrong under stock DDP too:

- A distributed sampler, Lightning's injected one above all, has no state. A `StatefulDataLoader` that is resumed draws
  its order anew, from random numbers that are others by then, or for another epoch. `make_resumable` gives it a state:
  what its order was drawn from, and how much of it was taken.
- Lightning stops asking a loader when it has had its number of batches, so a loader that was saved with an epoch's last
  batch never learns that the epoch is over: resumed, it gives nothing, and a whole epoch goes by without a batch.
  `finish_epochs` lets it begin the next one.
- A loader that is told so makes two iterators, and draws twice where it would have drawn once: `Iterators` says so.
- Where `max_steps` is set, Lightning takes every resume for one in the middle of an epoch. One that was saved at its
  end is then ended a second time, and what is left of the next one's order is passed over: `dont_restart`.
- An epoch in whose middle a fit has stopped counts as over: `reopen_epoch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader, DistributedSampler

from lightning_zero.plugin.data_order import has_state


class _Resumable(DistributedSampler[Any]):
    """A distributed sampler with a state; mixed into the class of one that has none."""

    _drawn_from: dict[str, Any]
    _taken = 0
    _resume: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        generator = self._inner_generator
        if resume is None:
            self._drawn_from, self._taken = {"epoch": self.epoch}, 0
            if isinstance(self, DistributedSamplerWrapper):  # whose order is another sampler's
                self._drawn_from["torch"] = torch.get_rng_state()
                if generator is not None:
                    self._drawn_from["generator"] = generator.get_state()
            order = list(super().__iter__())
        else:
            self._taken = resume["yielded"]
            self._drawn_from = {key: value for key, value in resume.items() if key != "yielded"}
            epoch = self.epoch
            self.set_epoch(resume["epoch"])
            with torch.random.fork_rng(devices=()):
                if "torch" in resume:
                    torch.set_rng_state(resume["torch"])
                if generator is not None and "generator" in resume:
                    generator.set_state(resume["generator"])
                order = list(super().__iter__())
            self.set_epoch(epoch)  # Lightning has set the one that comes next, if that one is over
        return self._count(order[self._taken :])

    def _count(self, order: Iterable[Any]) -> Iterator[Any]:
        for item in order:
            self._taken += 1
            yield item

    @property
    def _inner_generator(self) -> torch.Generator | None:
        inner = getattr(self.dataset, "_sampler", None)
        return getattr(inner, "generator", None)

    def state_dict(self) -> dict[str, Any]:
        """What the order was drawn from, and how many of it were taken."""
        return {**self._drawn_from, "yielded": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iterator go on from there."""
        self._resume = dict(state_dict)


def make_resumable(loader: object) -> None:
    """Give the distributed sampler of a loader that saves its state one of its own, if it has none."""
    if has_state(loader):
        for sampler in (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        ):
            if isinstance(sampler, DistributedSampler) and not hasattr(sampler, "state_dict"):
                kind = type(sampler)
                sampler.__class__ = type(kind.__name__, (_Resumable, kind), {"__module__": kind.__module__})
                sampler._drawn_from = {"epoch": sampler.epoch}  # type: ignore[attr-defined]


def next_epoch(loops: dict[str, Any]) -> int:
    """The epoch of the first batch that a run resumed from this state will draw."""
    fit = loops.get("fit_loop", {})
    progress = fit.get("epoch_progress", {}).get("current", {})
    return int(progress.get("ready" if is_at_epochs_end(loops) else "processed", 0))


Iterators = Literal["one", "two", "another later"]
"""How many iterators a resumed loader makes before its first batch; `another later`: the second in the first epoch."""


def finish_epochs(loops: dict[str, Any], *, by_steps: bool) -> Iterators:
    """If the fit loop's state is that of an epoch's last batch, let its loaders begin the next epoch.

    A state without a generator says nothing but how far the epoch was, and is dropped. One with a generator, which
    the next epoch's order is drawn from, is kept and marked as finished. Where training is counted in steps and the
    epoch was over, Lightning itself goes through what is left of it, which is nothing, and then to the next.

    Args:
        loops: `checkpoint["loops"]`; changed in place.
        by_steps: whether `max_steps` is set.
    """
    fit = loops.get("fit_loop", {})
    states = fit.get("state_dict", {}).get("combined_loader", [])
    if not is_at_epochs_end(loops):
        return "one"
    if _was_validated(loops):
        return "another later"
    if not states:
        return "one"
    if not all(isinstance(state, dict) and "_iterator_finished" in state for state in states):
        return "one"  # somebody else's loader, which knows for itself
    epoch = fit.get("epoch_progress", {}).get("current", {})
    if by_steps and epoch.get("processed", 0) > epoch.get("completed", 0):
        return "another later"
    if not any(_has_generator(state) for state in states):
        fit["state_dict"].pop("combined_loader")
        return "one"
    for state in states:
        state["_iterator_finished"] = True
        _rewind_samplers(state)
    return "two"


def _was_validated(loops: Mapping[str, Any]) -> bool:
    """Saved at the end of an epoch's validation: Lightning goes to the end of that epoch first, without a batch."""
    fit = loops.get("fit_loop", {})
    batches = fit.get("epoch_loop.batch_progress", {}).get("current", {})
    epoch = fit.get("epoch_progress", {}).get("current", {})
    hooks_are_done = batches.get("completed", 0) == batches.get("processed", 0)
    return bool(hooks_are_done and epoch.get("processed", 0) < epoch.get("started", 0))


def is_at_epochs_end(loops: Mapping[str, Any]) -> bool:
    """Whether the fit loop's state is that of an epoch's last batch, and that one has been trained on."""
    progress = loops.get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    current = progress.get("current", {})
    return bool(progress.get("is_last_batch")) and current.get("processed", 0) >= current.get("ready", 0)


def is_over(loops: Mapping[str, Any]) -> bool:
    """Whether the fit loop's state is that of an epoch whose end was come to, and not only its last batch."""
    epoch = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    return is_at_epochs_end(loops) and epoch.get("processed", 0) == epoch.get("started", 0) > 0


def reopen_epoch(loops: dict[str, Any]) -> None:
    """Let an epoch go on that a fit has stopped in (by `max_steps`, say), and that Lightning has counted as over.

    It would go on in the middle of the next one, or begin that, whichever a resumed run counts by.

    Args:
        loops: `checkpoint["loops"]`; changed in place.
    """
    fit = loops.get("fit_loop", {})
    batches = fit.get("epoch_loop.batch_progress", {}).get("current", {})
    epoch = fit.get("epoch_progress", {})
    counts = [epoch[which] for which in ("total", "current") if which in epoch]
    stopped = all(count["processed"] == count["started"] == count["ready"] > 0 for count in counts)
    in_its_middle = batches.get("ready", 0) == batches.get("completed", 0) > 0 and not is_at_epochs_end(loops)
    if stopped and in_its_middle:
        for count in counts:
            count["processed"] = count["completed"] = count["started"] - 1


def forget_untrained_batch(loops: dict[str, Any]) -> None:
    """Let a batch that was there, and wasn't trained on, be one that hasn't come yet.

    Lightning would count a step for it, and then train on it.

    Args:
        loops: `checkpoint["loops"]`; changed in place.
    """
    progress = loops.get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    _count_skipped_batches(progress)
    counts = [progress[which] for which in ("total", "current") if which in progress]
    if any(count.get("processed", 0) < count.get("ready", 0) for count in counts):
        progress["is_last_batch"] = False
        for count in counts:
            count["ready"] = count["started"] = count["processed"]


def _count_skipped_batches(progress: dict[str, Any]) -> None:
    """Let batches at which `on_train_batch_start` ended an earlier epoch be begun and completed, as all others are.

    Lightning counts them as processed alone, and sees by these totals in which part of a batch a checkpoint was saved.
    """
    total, current = progress.get("total", {}), progress.get("current", {})
    skipped = [count.get("processed", 0) - count.get("started", 0) for count in (total, current)]
    if skipped[0] > skipped[1]:
        for name in ("started", "completed"):
            total[name] = total.get(name, 0) + skipped[0] - skipped[1]


def dont_restart(loop: _Loop) -> None:
    """Have a loop, and those in it, begin anew, even where `max_steps` is set."""
    loop._restarting = False
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            dont_restart(inner)


def draw_seeds_of_later_loaders(loop: _EvaluationLoop) -> None:
    """Draw what the iterators of a validation's loaders would have drawn, but for the first loader's."""
    loop.setup_data()
    combined = loop._combined_loader
    if combined is None or combined._mode != "sequential":  # else Lightning makes all of them at once
        return
    for loader in combined.flattened[1:]:
        if isinstance(loader, DataLoader):
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def _has_generator(state: dict[str, Any]) -> bool:
    return "generator" in state or any(_has_generator(value) for value in state.values() if isinstance(value, dict))


def _rewind_samplers(state: dict[str, Any]) -> None:
    # A finished iterator is replaced by a new one, but a sampler with a state of its own would skip as before.
    for key, value in state.items():
        if key == "sampler_state" and isinstance(value, dict) and "yielded" in value:
            value["yielded"] = 0
        elif isinstance(value, dict):
            _rewind_samplers(value)
